"""The Colab notebook runs from its first cell to its last, on a tiny text and without the package installed."""

import random
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "ashem_colab.ipynb"
SIZES = {"num_samples": 100, "seq_len": 8, "batch_size": 8, "dim": 16, "max_epochs": 1}


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_no_outputs_are_stored(notebook: Any) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)


def test_the_notebook_runs(notebook: Any, tmp_path: Path) -> None:
    draw = random.Random(0)
    for name, count in (("train", 1000), ("valid", 300), ("test", 200)):
        words = (f"word{draw.randrange(300)}" for _ in range(count))
        (tmp_path / f"{name}.txt").write_text(" ".join(words))
    out = tmp_path / "run"
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source += f"\nDATA, OUT, SIZES = {str(tmp_path)!r}, {str(out)!r}, {SIZES!r}"

    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()

    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    # What is printed arrives in pieces, cut wherever it was flushed.
    printed = {name: "".join(piece.get("text", "") for piece in pieces) for name, pieces in outputs.items()}
    assert "in-sample phase 2, epoch  1" in printed["run"]
    assert printed["in-sample"].startswith("in-sample")
    assert printed["held-out"].startswith("held-out")
    assert "image/png" in outputs["plot"][-1].data
    assert (out / "summary.json").is_file()
