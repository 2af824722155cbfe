"""The documentation runs: snippets, commands, links and tables say what is so."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import ease.report.page
from ease import ASHEMConfig
from ease.cli.main import COMMANDS, main
from ease.cli.recipes import recipes
from ease.runs import reopen as finished
from ease.runs import runner as runs
from experiments import reproduce

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(page for page in DOCS.rglob("*.md") if DOCS / "data" not in page.parents)]
FENCE = re.compile(r"^( *)```(\w*)(?: title=\"([\w.]+)\")?\n(.*?)^\1```$", re.M | re.S)
# Pages whose commands belong between their snippets: both are run, in order.
WALKS = {"pretrained-models.md", "tasks.md", "plotting.md", "your-own-strategy.md"}
TRANSFORMERS = {"pretrained-models.md", "tasks.md"}  # pages that need it
# Options that make the commands of such a page quick, by the page.
QUICK = {"your-own-strategy.md": ["--strategy.max-flops", "1e9", "--strategy.finish-max-flops", "1e9"]}
DEMO = "runs/demo"  # snippets that read this folder find a short run there
SMALL = ["--num-layers", "2", "--dim", "16", "--max-epochs", "1", "--device", "cpu"]  # for the scripts of a page
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


class Block(NamedTuple):
    """A code block of a page."""

    line: int
    """The number of its first line."""
    language: str
    file: str
    """The file that it shows, or nothing."""
    code: str


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    """The code blocks of a page in these languages, in order."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        if found[2] in languages:
            yield Block(text.count("\n", 0, found.start(4)) + 1, found[2], found[3] or "", dedent(found[4]))


def commands() -> list[list[str]]:
    """Every `ease ...` command that a page shows."""
    pages = [page for page in PAGES if page.name not in WALKS]
    lines = [line for page in pages for block in blocks(page, "sh") for line in block.code.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("ease ")]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def short_run(cache: Path) -> Path:
    """The demo at a budget that says nothing, for what is said of a run's files."""
    folder = cache / "demo"
    options = ["--strategy.phase1-max-flops", "1e9", "--strategy.phase2-max-flops", "1e9", "--model.dim", "16"]
    options += [
        "--data.seq-len",
        "32",
        "--data.batch-size",
        "8",
        "--data.epoch-batches",
        "4",
        "--data.eval-batches",
        "4",
    ]
    assert main(["run", "demo", *options, "--device", "cpu", "--out", str(folder)]) == 0
    return folder


@every_page
def test_the_snippets_run(
    page: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EASE_CACHE", str(cache))
    monkeypatch.setenv("HF_HOME", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    # A module of that name, so that what a snippet defines (a dataclass, say) can be looked up.
    name = f"docs_{page.stem.replace('-', '_').lower()}"
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    if page.name in TRANSFORMERS:
        pytest.importorskip("transformers")
    steps = list(blocks(page, "python", "sh") if page.name in WALKS else blocks(page, "python"))
    if any(DEMO in step.code for step in steps if step.language == "python"):
        shutil.copytree(request.getfixturevalue("short_run"), tmp_path / DEMO)
    if any("matplotlib" in step.code for step in steps):
        pytest.importorskip("matplotlib")
    for step in steps:
        if step.file:
            Path(step.file).write_text(step.code, encoding="utf-8")
            monkeypatch.delitem(sys.modules, Path(step.file).stem, raising=False)
            continue
        if step.language == "python":
            # Padded, so that an error names the line of the page.
            exec(compile("\n" * (step.line - 1) + step.code, str(page), "exec"), module.__dict__)
            continue
        for command in step.code.splitlines():
            args = shlex.split(command, comments=True)
            if "--help" in args:
                continue
            if args[0] == "ease":
                assert main([*args[1:], *QUICK.get(page.name, [])]) == 0, command
            elif "lm_eval" not in command or importlib.util.find_spec("lm_eval"):
                assert args[0] == "python"
                if (ROOT / args[1]).is_file():
                    args[1:] = [str(ROOT / args[1]), *args[2:], *SMALL]
                done = subprocess.run([sys.executable, *args[1:]], capture_output=True, text=True)
                assert done.returncode == 0, done.stderr[-2000:]
    if "pyplot" in module.__dict__ or "plt" in module.__dict__:
        module.plt.close("all")


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
    shown = {
        (page.parent / name).resolve()
        for page in PAGES
        for name in re.findall(r"!\[[^\]]+\]\(([\w./-]+\.svg)\)", page.read_text(encoding="utf-8"))
    }
    drawn = {path for path in DOCS.rglob("*.svg") if DOCS / "data" not in path.parents}
    assert drawn <= shown
    for path in drawn:
        picture = path.read_text(encoding="utf-8")
        assert "<title" in picture
        assert "<desc" in picture
        assert "prefers-color-scheme: dark" in picture


class Parsed(Exception):
    """The command line was understood; nothing needs to run."""


@pytest.mark.parametrize("args", commands(), ids=" ".join)
def test_the_commands_are_understood(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise Parsed

    work = ((runs, "run"), *((finished, name) for name in ("load_start", "evaluate", "calibrate")))
    for module, name in (*work, (reproduce, "reproduce")):
        monkeypatch.setattr(module, name, stop)
    monkeypatch.setattr(ease.report, "write_report", stop)
    monkeypatch.setattr(finished, "export", stop)
    monkeypatch.setattr("ease.runs.live.LiveRun", stop)
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
    shown = {"run", "watch", "tune", "generate", "serve", "eval", "calibrate", "report", "export", "reproduce"}
    assert {args[0] for args in commands()} == shown


def test_the_settings_of_ashem_are_listed_with_their_defaults() -> None:
    text = (DOCS / "research" / "ashem.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text, re.M))
    assert rows == {field.name: repr(field.default) for field in fields(ASHEMConfig)}


def test_the_reference_shows_the_help_of_every_command() -> None:
    text = (DOCS / "reference" / "command-line.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^## ease (\w+)$", text, re.M)) == set(COMMANDS)
    assert set(re.findall(r"^<!-- ease (\w+)(?: --help)? -->$", text, re.M)) == set(COMMANDS)


def test_every_recipe_is_listed_with_its_cost() -> None:
    text = (DOCS / "reference" / "recipes.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w-]+)` \|", text, re.M)) == set(recipes())


def test_every_public_name_is_in_the_reference() -> None:
    pages = [page.read_text(encoding="utf-8") for page in (DOCS / "reference" / "api").glob("*.md")]
    shown = {name for page in pages for name in re.findall(r"^::: ([\w.]+)$", page, re.M)}
    named = {name for name in ease.__all__ if not isinstance(getattr(ease, name), ModuleType | str)}
    assert {f"ease.{name}" for name in named} <= shown


def field_names(page: str, heading: str) -> set[str]:
    """The fields that the first table under a heading lists, or after a paragraph that starts with it."""
    table = page.split(heading, 1)[1].split("\n| ", 1)[1].split("\n\n", 1)[0]
    return {
        name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[0 if row[0] == "`" else 1])
    }


def test_the_fields_of_a_runs_files_are_listed(short_run: Path) -> None:
    page = (DOCS / "reference" / "run-folder.md").read_text(encoding="utf-8")
    summary = json.loads((short_run / "summary.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (short_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    line = summary["lines"][-1]
    for heading, value in (
        ("An epoch's row", {name: 0 for row in rows if row["event"] == "epoch" for name in row}),
        ("A step's row", next(row for row in rows if row["event"] == "step")),
        ("## run.json", json.loads((short_run / "run.json").read_text(encoding="utf-8"))),
        ("## summary.json", summary),
        ("An object of `lines`:", line),
        ("An object of `val` and `test`", line["test"]),
    ):
        assert field_names(page, heading) == set(value), heading
    files = {path.name for path in short_run.iterdir()}
    table = page.split("| file |", 1)[1].split("\n\n", 1)[0]
    assert set(re.findall(r"^\| `([\w.]+)` \|", table, re.M)) == files | {"policy.json", "counts.safetensors"}


@every_page
def test_no_page_names_a_path_of_a_machine(page: Path) -> None:
    found = re.findall(r"(?<![\w.])/(?:work|tmp|root|home|Users|mnt|opt|usr)\b\S*", page.read_text(encoding="utf-8"))
    assert not found
