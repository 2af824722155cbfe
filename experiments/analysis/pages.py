"""The output folder of an experiment: its tables as Markdown and LaTeX, and its figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.analysis import plots
from experiments.analysis.table import write_tables
from experiments.analysis.tables import all_tables


def write(data: dict[str, Any], folder: Path) -> None:
    """Write tables and figure of one experiment, from nothing but the content of its `test.json`."""
    write_tables(all_tables(data), folder, "front")
    plots.front(data, folder / "front")
