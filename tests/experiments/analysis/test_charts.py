"""The bar charts of the results page: each shows the numbers of the tables that it is drawn from, and is kept."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.analysis.charts import CHARTS, DATA, Cell, draw, main, number

PAGE = (DATA.parent / "research" / "results.md").read_text(encoding="utf-8")


def texts(picture: Path) -> set[str]:
    """The texts of an SVG file."""
    return set(re.findall(r"<text[^>]*>([^<]+)</text>", picture.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_shows_the_numbers_of_its_table_and_is_on_the_page(name: str, tmp_path: Path) -> None:
    table = (DATA / f"{name}.md").read_text(encoding="utf-8")
    expected = {number(table, cell) for cells in CHARTS[name].bars.values() for cell in cells if cell is not None}
    drawn = tmp_path / f"{name}.svg"
    draw(CHARTS[name], table, drawn)
    assert expected <= texts(drawn)
    assert texts(drawn) == texts(DATA / f"{name}.svg"), "draw it again by python -m experiments.analysis.charts"
    assert f"](../data/{name}.svg)" in PAGE


def test_numbers_are_read_as_they_are_written() -> None:
    table = "| run | exits | PPL |\n| --- | --- | --- |\n| a | 4 | 1 |\n| a | 8 | **1,689** (of 3) |\n| b | 8 | |"
    assert number(table, Cell(("a", "8"), 2)) == "1,689"
    for row in (("b", "8"), ("c",)):
        with pytest.raises(LookupError, match="no table has a number"):
            number(table, Cell(row, 2))


def test_every_chart_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHARTS:
        (tmp_path / f"{name}.md").write_text((DATA / f"{name}.md").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr("experiments.analysis.charts.DATA", tmp_path)
    main()
    assert {path.stem for path in tmp_path.glob("*.svg")} == set(CHARTS)
