"""The notebooks run from the first cell to the last on a tiny text, without network and from their own folder."""

import random
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
COLAB_SIZES = {"num_samples": 100, "seq_len": 8, "batch_size": 8, "dim": 16, "max_epochs": 1}


def read(name: str) -> Any:
    return nbformat.read(FOLDER / name, as_version=4)


def write_texts(folder: Path, words: dict[str, int]) -> None:
    draw = random.Random(0)
    for name, count in words.items():
        (folder / f"{name}.txt").write_text(" ".join(f"word{draw.randrange(300)}" for _ in range(count)))


def execute(name: str, parameters: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Runs a notebook with other parameters; the printed text and the outputs of each code cell."""
    notebook = read(name)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    cell.source += "\n" + parameters
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    # Printed text arrives in pieces, split wherever it was flushed.
    printed = {name: "".join(piece.get("text", "") for piece in pieces) for name, pieces in outputs.items()}
    return printed, outputs


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_outputs_are_stored(name: str) -> None:
    code = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert code
    assert not any(cell.outputs or cell.execution_count for cell in code)


def test_the_original_notebook_runs(tmp_path: Path) -> None:
    write_texts(tmp_path, {"train": 1000, "valid": 300, "test": 200})
    out = tmp_path / "run"
    printed, outputs = execute(
        "ashem_colab.ipynb", f"DATA, OUT, SIZES = {str(tmp_path)!r}, {str(out)!r}, {COLAB_SIZES!r}"
    )
    assert "in-sample phase 2, epoch  1" in printed["run"]
    assert printed["in-sample"].startswith("in-sample")
    assert printed["held-out"].startswith("held-out")
    assert "image/png" in outputs["plot"][-1].data
    assert printed["conclusion"].startswith("Conclusion. In-sample, phase 2")
    assert "Only the held-out figures" in " ".join(printed["conclusion"].split())
    assert (out / "summary.json").is_file()


def test_the_wikitext_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path, {"train": 2500, "valid": 500, "test": 500})
    monkeypatch.setenv("LEGO_DATA", str(tmp_path))  # the default of DATA
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    sizes = "TOKENIZER, DIM, SEQ_LEN, BATCH_SIZE = 'bpe:300', 16, 16, 4"
    slices = "EPOCH_BATCHES, VAL_BATCHES, TEST_BATCHES = 6, 2, 4"
    printed, outputs = execute("wikitext2.ipynb", f"BUDGET, RATES = 2e8, (1e-2, 2e-2)\n{sizes}\n{slices}")

    standard = [f"standard, {layers}" for layers in ("1 layer", "2 layers", "3 layers")]
    lines = [*standard, "phase 1", "phase 1 continued", "ASHEM", "growth 1-2", "growth 1-2-3"]
    table = [row for row in printed["table"].splitlines() if row.startswith(tuple(lines))]
    assert [row[:20].strip() for row in table] == lines
    # Equal training FLOPs: within one step and one validation pass, which is much of so short a run.
    budgets = {row[:20].strip(): float(row.split()[-1]) for row in table}
    assert budgets.pop("phase 1") < 1.5e8
    assert all(1.5e8 < flops < 2.5e8 for flops in budgets.values()), budgets
    for cell in ("curves", "sweep"):
        assert "image/png" in outputs[cell][-1].data

    sweep = [row.split() for row in printed["sweep"].splitlines()[1:]]
    assert len(sweep) == 11
    continuing = [float(row[1].rstrip("%")) for row in sweep]
    assert continuing == sorted(continuing)
    assert (continuing[0], continuing[-1]) == (0.0, 100.0)
    page = outputs["explorer"][-1].data["text/html"]
    assert page.count("leave after layer 1</p>") == 5
    assert "leaves after layer 1" in page
    assert "confidence" in page
    assert "ASHEM: " in printed["conclusion"]
    assert "the best standard model" in printed["conclusion"]
