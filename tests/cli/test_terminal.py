"""What a terminal of 80 columns and a pipe get: help without torch, complete tables, and a quiet end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ease.cli.main import CLOSED_PIPE, COMMANDS, main

HELP = [["--help"], ["run"], *([name, "--help"] for name in COMMANDS), ["run", "demo", "--help"]]


@pytest.mark.parametrize("args", HELP, ids=" ".join)
def test_help_fits_80_columns(
    args: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    try:
        status = main(args)
    except SystemExit as end:
        status = int(end.code or 0)
    printed = capsys.readouterr().out
    assert status == 0
    assert printed
    assert [line for line in printed.splitlines() if len(line) > 80 or "…" in line] == []


@pytest.mark.parametrize("args", [["--help"], ["run"], ["--version"]], ids=" ".join)
def test_help_does_not_import_torch(args: list[str]) -> None:
    code = f"import sys; from ease.cli.main import main; main({args!r}); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_package_is_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "ease", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ease ")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes close as on POSIX")
@pytest.mark.parametrize("args", [["--help"], ["run"], ["run", "demo", "--help"], ["eval", "RUN"]], ids=" ".join)
def test_a_closed_pipe_ends_a_command_quietly(args: list[str], made: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "ease", *(str(made) if arg == "RUN" else arg for arg in args)]
    env = os.environ | {"EASE_CACHE": str(made.parent / "cache")}
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=env, check=False)
    finally:
        os.close(write)
    assert done.returncode == CLOSED_PIPE
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_eval_fits_80_columns(made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASE_CACHE", str(made.parent / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["eval", str(made), "--threshold", "0.2", "0.95"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for part in ("threshold", "0.2", "0.95", "time", "early", "layers", "/token"):
        assert part in printed
    assert "…" not in printed
