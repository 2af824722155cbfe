"""The README: short, in a fixed order, the same in both languages, and with the numbers of the run it shows."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from experiments.analysis.pictures import BROWSERS, digest, main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ja.md")}
RECORD: dict[str, Any] = json.loads((DOCS / "report.json").read_text(encoding="utf-8"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
ORDER = [
    "# LEGO",
    "](docs/explorer.gif)",
    "## Install",
    "download.pytorch.org/whl/cpu",
    "## Try it",
    "`make demo`",
    "## Three ways to use it",
    "**Train in stages**",
    "**Give exits to your checkpoint**",
    "**Compare strategies fairly**",
    "## Does it pay?",
    "## What is supported",
    "## Documentation, citation, license",
]
each_language = pytest.mark.parametrize("name", PAGES)


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and code of every code block."""
    return FENCE.findall(page)


def without_comments(code: str) -> list[str]:
    """The lines of a code block without comments and without the space before them."""
    return [re.sub(r"(^|\s+)# .*", "", line) for line in code.splitlines()]


def test_sections_come_in_their_order() -> None:
    rest = PAGES["README.md"]
    for mark in ORDER:
        before, found, rest = rest.partition(mark)
        assert found, f"{mark} is missing, or above what should come first"
        assert not re.search(r"^## ", FENCE.sub("", before), re.M), f"a section without a place before {mark}"
    assert "\n## " not in rest


@each_language
def test_the_page_is_short(name: str) -> None:
    assert len(PAGES[name].splitlines()) <= 100


@each_language
def test_links_lead_to_files(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s#]+)", FENCE.sub("", PAGES[name])):
        assert (ROOT / target).is_file(), target


def test_both_languages_have_the_same_commands_and_code() -> None:
    english, japanese = ([(kind, without_comments(code)) for kind, code in blocks(page)] for page in PAGES.values())
    assert english == japanese


def test_both_languages_have_the_same_numbers_links_and_names() -> None:
    other = {"README.md": "README.ja.md", "README.ja.md": "README.md"}
    patterns = {
        "numbers": r"(?<![\w.])[+-]?\d+(?:,\d{3})*(?:\.\d+)*[%k]?",
        "links": r"\]\(([^)\s]+)\)",
        "names": r"`([^`]+)`",
    }
    for what, pattern in patterns.items():
        found = []
        for name, page in PAGES.items():
            assert f"]({other[name]})" in page
            prose = FENCE.sub("", page).replace(f"]({other[name]})", "")
            if what == "numbers":
                prose = re.sub(r"\]\([^)]*\)", "", prose)
            found.append(sorted(re.findall(pattern, prose, re.ASCII)))
        assert found[0] == found[1], what


@each_language
def test_the_output_shown_is_that_of_the_run_in_the_pictures(name: str) -> None:
    (shown,) = (code.splitlines() for kind, code in blocks(PAGES[name]) if kind == "text")
    printed = [line.strip() for line in RECORD["output"]]
    assert [line for line in shown if line.strip() not in printed] == [], "run `make picture` and show its output"
    assert max(map(len, shown)) <= 80
    values = {line: value for line, value in RECORD["perplexity"].items() if not any(line in row for row in shown)}
    assert not values, "every line of the run is shown"


@pytest.mark.parametrize("picture", ["report.png", "explorer.gif"])
def test_pictures_show_the_run_of_the_record(picture: str) -> None:
    assert digest(RECORD).encode() in (DOCS / picture).read_bytes(), "run `make picture`"


PARTS = ("five-seeds/1-s", "1-s", "1-s-memory")


@each_language
def test_the_table_has_the_numbers_of_the_data(name: str) -> None:
    data = "".join((DOCS / "data" / part / "front.md").read_text("utf-8") for part in PARTS)
    measured = [re.sub(r" \([^)]*\)", "", row).split(" | ") for row in data.splitlines() if row.startswith("| ")]
    rows = re.findall(r"^\| [^|]+ \| (\d[^|]*) \| ([^|]+) \| ([^|]+) \|$", PAGES[name], re.M)
    assert len(rows) == 4
    for row in rows:
        assert any(set(row) <= set(line) for line in measured), row


def test_pictures_are_made_by_a_browser(tmp_path: Path) -> None:
    if not any(map(shutil.which, BROWSERS)):
        pytest.skip("no Chromium or Chrome")
    from ease.report.page import write_report

    run = tmp_path / "run"
    run.mkdir()
    scores = {"ppl": 5.0, "acc": 0.5, "exit_shares": {"1": 1.0}, "flops_per_token": 9e4, "compute_cost": 1.0}
    line = {"name": "phase 1", "num_layers": 1, "train_flops": 1e12, "curve": [], "test": scores}
    summary = {"format": 1, "name": "demo", "seed": 0, "data": {"name": "text"}, "lines": [line]}
    runs = [{"thresholds": [t], "exits": [1, 2], "confidences": [0.5, 0.1], "totals": scores} for t in (0.0, 0.4)]
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "explorer.json").write_text(json.dumps({"tokens": ["a", "b"], "exits": [1, 2], "runs": runs}))
    write_report([run], run / "report.html")
    main(run, tmp_path, frames=2)
    record = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert record["perplexity"] == {"phase 1": "5.00"}
    for picture in ("report.png", "explorer.gif"):
        assert digest(record).encode() in (tmp_path / picture).read_bytes()
