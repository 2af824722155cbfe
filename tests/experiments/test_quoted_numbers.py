"""Numbers in the documentation: each is in the data that its section names, and kept tables follow from kept data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from experiments.analysis.pages import write
from experiments.studies import claims

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs" / "data"

BLOCK = re.compile(r"<!-- from (\S+) -->\n(.*?)<!-- end -->", re.S)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def strangers(page: str, root: Path) -> list[str]:
    """The numbers in a page's generated blocks that the file named there does not hold."""
    return [
        number
        for source, block in BLOCK.findall(page)
        for number in set(NUMBER.findall(block)) - set(NUMBER.findall((root / source).read_text(encoding="utf-8")))
    ]


def test_a_number_that_no_data_holds_is_found(tmp_path: Path) -> None:
    (tmp_path / "front.md").write_text("| ASHEM | 4.71 (4.61 to 4.80) | 1,234k |")
    page = "<!-- from front.md -->\n| ASHEM | {} |\n<!-- end -->\nelsewhere 99"
    assert strangers(page.format("4.71, 1,234k"), tmp_path) == []
    assert strangers(page.format("4.72"), tmp_path) == ["4.72"]


@pytest.mark.parametrize(
    "page",
    sorted({ROOT / "README.md", *(ROOT / "docs").rglob("*.md")} - set(DATA.rglob("*.md"))),
    ids=lambda page: page.name,
)
def test_documents_quote_generated_figures_only(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- from ") == len(BLOCK.findall(text)), "every block ends with <!-- end -->"
    assert strangers(text, ROOT) == []


MEASURED = re.compile(r"(?<![\w.,])\d[\d,]*(?:\.\d+(?:e\d+|%|k)?|e\d+|%|k\b)(?!\.?\d)")
"""What only a measurement or a count can say: a number with a point, in per cent, in thousands or with an exponent."""


def unfounded(page: str, root: Path) -> list[str]:
    """The measured numbers in a page's prose that neither the data its section names nor its commands hold.

    A paragraph or an item that says "by hand" is of figures that no command makes.
    """
    found = []
    for section in re.split(r"(?m)^## ", page):
        sources = {
            *re.findall(r"<!-- from docs/(\S+) -->", section),
            *re.findall(r"\]\((?:\.\./)?(data/[^)]+\.md)\)", section),
        }
        commands = "\n".join(re.findall(r"(?m)^    .*|`[^`]*`", section))
        held = commands + "".join((root / "docs" / source).read_text(encoding="utf-8") for source in sources)
        prose = re.sub(r"(?m)^    .*|`[^`]*`|\]\([^)]*\)|^\|.*|<!--.*?-->", "", BLOCK.sub("", section))
        for paragraph in re.split(r"\n\s*\n|\n(?=- )", prose):
            if "by hand" not in " ".join(paragraph.lower().split()):
                found += [
                    n
                    for n in MEASURED.findall(paragraph)
                    if not re.search(rf"(?<![\d.]){re.escape(n)}(?!\d|\.\d)", held)
                ]
    return found


def test_prose_without_data_is_found(tmp_path: Path) -> None:
    (tmp_path / "docs" / "data").mkdir(parents=True)
    (tmp_path / "docs" / "data" / "x.md").write_text("| ASHEM | 4.71 | 12.5% | 143.2k |")
    page = "# R\n\n## A\n\n    do --lr 0.02\n\n{}, see [all](data/x.md).\n"
    assert unfounded(page.format("4.71 at 0.02 and 12.5%, 143.2k, 3 seeds"), tmp_path) == []
    assert unfounded(page.format("4.7 at 13%"), tmp_path) == ["4.7", "13%"]
    assert unfounded(page.format("- worked out by\nhand: 4.7\n- and 2.5%"), tmp_path) == ["2.5%"]
    assert unfounded(page + "\n## B\n\n4.71\n", tmp_path) == ["4.71"], "each section names its data"


@pytest.mark.parametrize("name", ["results", "results-appendix", "what-did-not-work"])
def test_results_say_no_number_that_no_data_holds(name: str) -> None:
    page = (ROOT / "docs" / "research" / f"{name}.md").read_text(encoding="utf-8")
    assert unfounded(page, ROOT) == []
    assert name != "results" or "by hand" not in page.lower(), "the summary has no number without a command"
    outside = BLOCK.sub("", page)
    assert not re.findall(r"(?m)^\|.*", outside), "every table stands in a block that names its data"


@pytest.mark.parametrize("path", sorted(DATA.rglob("test.json")), ids=lambda path: path.parent.name)
def test_kept_tables_are_what_kept_figures_make(path: Path, tmp_path: Path) -> None:
    write(json.loads(path.read_text(encoding="utf-8")), tmp_path)
    for made in tmp_path.iterdir():
        kept = path.parent / made.name
        if made.suffix in (".md", ".tex") and kept.exists():
            assert kept.read_text(encoding="utf-8") == made.read_text(encoding="utf-8")


def test_the_table_of_claims_follows_from_the_kept_tables(tmp_path: Path) -> None:
    claims.main(str(tmp_path), str(DATA))
    assert (tmp_path / "claims.md").read_text(encoding="utf-8") == (DATA / "claims.md").read_text(encoding="utf-8")
