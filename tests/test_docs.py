"""The documentation runs: snippets, commands, links and tables say what is so."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import pytest

import ease.report.page
from ease import ASHEMConfig
from ease.cli.main import main
from ease.runs import reopen as finished
from ease.runs import runner as runs
from experiments import reproduce

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
# Pages whose commands belong between their snippets: both are run, in order.
WALKS = {"real-llms.md", "tasks.md"}
SMALL = ["--num-layers", "2", "--dim", "16", "--max-epochs", "1", "--device", "cpu"]  # for the scripts of a page
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """The code blocks of a page in one language, each with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        if found[2] == language:
            yield text.count("\n", 0, found.start(3)) + 1, dedent(found[3])


def commands() -> list[list[str]]:
    """Every `ease ...` command that a page shows."""
    pages = [page for page in PAGES if page.name not in WALKS]
    lines = [line for page in pages for _, block in blocks(page, "sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("ease ")]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@every_page
def test_the_snippets_run(page: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EASE_CACHE", str(cache))
    monkeypatch.setenv("HF_HOME", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", sys.path[:])
    # A module of that name, so that what a snippet defines (a dataclass, say) can be looked up.
    name = f"docs_{page.stem.replace('-', '_').lower()}"
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    if page.name in WALKS:
        pytest.importorskip("transformers")
    steps = [(line, "python", block) for line, block in blocks(page, "python")]
    if page.name in WALKS:
        steps += [(line, "sh", block) for line, block in blocks(page, "sh")]
    for line, language, block in sorted(steps):
        if language == "python":
            # Padded, so that an error names the line of the page.
            exec(compile("\n" * (line - 1) + block, str(page), "exec"), module.__dict__)
            continue
        for command in block.splitlines():
            args = shlex.split(command, comments=True)
            if args[0] == "ease":
                assert main(args[1:]) == 0, command
            elif "lm_eval" not in command or importlib.util.find_spec("lm_eval"):
                assert args[0] == "python"
                if (ROOT / args[1]).is_file():
                    args[1:] = [str(ROOT / args[1]), *args[2:], *SMALL]
                done = subprocess.run([sys.executable, *args[1:]], capture_output=True, text=True)
                assert done.returncode == 0, done.stderr[-2000:]


@every_page
def test_links_and_pictures_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT), f"{target} leads out of the repository"
        assert file.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(file), f"{file.name} has no heading #{anchor}"


def test_every_page_is_reached_from_the_readme() -> None:
    found, rest = set[Path](), [ROOT / "README.md"]
    while rest:
        page = rest.pop()
        found.add(page)
        links = re.findall(r"\]\(([\w./-]+\.md)[)#]", page.read_text(encoding="utf-8"))
        rest += [file for link in links if (file := (page.parent / link).resolve()) not in found]
    assert set(PAGES) <= found


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_picture_is_shown_and_described() -> None:
    shown = {name for page in PAGES for name in re.findall(r"!\[[^\]]+\]\((?:docs/)?([\w-]+\.svg)\)", page.read_text())}
    drawn = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.svg")}
    assert shown == set(drawn)
    for picture in drawn.values():
        assert "<title" in picture
        assert "<desc" in picture
        assert "prefers-color-scheme: dark" in picture


class Parsed(Exception):
    """The command line was understood; nothing needs to run."""


@pytest.mark.parametrize("args", commands(), ids=" ".join)
def test_the_commands_are_understood(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise Parsed

    work = ((runs, "run"), (runs, "load_start"), (finished, "evaluate"), (finished, "calibrate"))
    for module, name in (*work, (reproduce, "reproduce")):
        monkeypatch.setattr(module, name, stop)
    monkeypatch.setattr(ease.report, "write_report", stop)
    if args == ["run"]:
        assert main(args) == 0
    elif "--help" in args:
        with pytest.raises(SystemExit) as end:
            main(args)
        assert end.value.code == 0
    else:
        with pytest.raises(Parsed):
            main(args)


def test_the_commands_are_found() -> None:
    assert {args[0] for args in commands()} == {"run", "eval", "calibrate", "report", "reproduce"}


def test_the_settings_of_ashem_are_listed_with_their_defaults() -> None:
    text = (ROOT / "docs" / "ashem.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text, re.M))
    assert rows == {field.name: repr(field.default) for field in fields(ASHEMConfig)}


@every_page
def test_no_page_names_a_path_of_a_machine(page: Path) -> None:
    found = re.findall(r"(?<![\w.])/(?:work|tmp|root|home|Users|mnt|opt|usr)\b\S*", page.read_text(encoding="utf-8"))
    assert not found
