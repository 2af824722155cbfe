"""colab2.py on a tiny text: the figures it prints and their labels, its progress, and the files it writes."""

import contextlib
import io
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

import colab2

TINY = ["--num-samples", "200", "--seq-len", "8", "--batch-size", "8", "--dim", "16", "--max-epochs", "2"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 words, each with two likely successors, so that some tokens are easy and some are hard."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    for name, count in (("train", 2500), ("valid", 700), ("test", 300)):
        at, words = 0, []
        for _ in range(count):
            at = draw.choice([at * 3 % 400, at * 7 % 400 + 1, draw.randrange(400)]) % 400
            words.append(f"word{at}")
        (folder / f"{name}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="module")
def ran(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The output of one run, and its folder."""
    out, printed = tmp_path_factory.mktemp("runs") / "new" / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert colab2.main([*TINY, "--data", str(texts), "--out", str(out)]) == 0
    return printed.getvalue(), out


@pytest.fixture(scope="module")
def summary(ran: tuple[str, Path]) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not valid JSON")

    found: dict[str, Any] = json.loads((ran[1] / "summary.json").read_text(), parse_constant=refuse)
    return found


def test_exactly_half_of_the_tokens_are_hard(summary: dict[str, Any]) -> None:
    found = summary["in_sample"]
    assert found["hard_tokens"] == found["hard_tokens_mined"] == found["tokens"] / 2
    assert found["phase_1"]["tokens"] == found["final"]["tokens"] == found["tokens"]


def test_every_figure_is_in_sample_or_held_out(ran: tuple[str, Path]) -> None:
    text, _ = ran
    first, rest = text.split("held-out, on ")
    held_out, conclusion = rest.split("Conclusion. ")
    stated = [line for line in first.splitlines() if any(word in line for word in ("PPL", "acc", "ratio", "cost"))]
    assert len(stated) >= 4 + 8
    assert all(line.startswith("in-sample") for line in stated)
    for line in ("phase 1, epoch  1: PPL", "phase 2, epoch  1: PPL", "threshold", "hard tokens", "hard ratio"):
        assert f"in-sample {line}" in first
    for line in ("hard PPL before", "hard PPL after", "improvement", "shallow ratio", "compute cost"):
        assert f"in-sample {line}" in first
    assert "in-sample" not in held_out
    assert "phase 1 alone" in held_out
    for line in ("PPL", "accuracy", "hard PPL", "shallow ratio", "compute cost"):
        assert f"held-out {line}" in held_out
    said = " ".join(conclusion.split())
    assert said.startswith("In-sample, phase 2 changes the perplexity of the hard tokens")
    assert "Held-out, on test tokens that no training used" in said
    assert "Only the held-out figures predict the quality on new text." in said


@pytest.mark.parametrize(
    ("after", "verdict"), [(80.0, "makes the model better"), (120.0, "makes the model worse"), (100.5, "no difference")]
)
def test_the_conclusion_follows_the_held_out_figures(after: float, verdict: str) -> None:
    before = {"ppl": 100.0, "hard_ppl": 200.0}
    summary = {
        "in_sample": {"phase_1": before, "final": {"hard_ppl_as_trained": 50.0}},
        "held_out": {"phase_1": before, "final": {"ppl": after, "hard_ppl": 300.0}},
    }
    said = " ".join(colab2.conclusion(summary).split())
    assert verdict in said
    assert "from 200.0 to 50.0" in said
    assert "from 200.0 to 300.0" in said


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(colab2.time, "monotonic", lambda: now[0])
    return now


def test_piped_output_has_a_line_every_ten_seconds(clock: list[float]) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = colab2.Status()
        for second in range(36):
            clock[0] = float(second)
            status.show(f"second {second}")
        status.clear()
    assert printed.getvalue().splitlines() == ["second 10", "second 20", "second 30"]


def test_a_terminal_has_one_line_rewritten_in_place(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.redirect_stdout(Terminal()) as printed:
        status = colab2.Status()
        for text in ("x" * 200, "short"):
            clock[0] += 1
            status.show(text)
        status.print("an epoch")
    # A line as wide as the terminal would wrap, and what is left of a longer line is overwritten.
    assert printed.getvalue() == f"\r{'x' * 79}\r{'short':<79}\r     \ran epoch\n"


def test_progress_is_shown_before_the_first_epoch_ends(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(colab2.Status, "show", lambda self, text, at_once=False: print(text))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert colab2.main([*TINY, "--data", str(texts), "--out", str(tmp_path / "run")]) == 0
    lines = printed.getvalue().splitlines()
    epoch = next(i for i, line in enumerate(lines) if line.startswith("in-sample phase 1, epoch  1"))
    batches = [line for line in lines[:epoch] if line.startswith("phase 1, epoch 1: batch ")]
    assert len(batches) == 28
    assert batches[0].startswith("phase 1, epoch 1: batch 1 of 28 (4%), training loss ")
    assert batches[-1] == "phase 1, epoch 1: batch 28 of 28, validating"
    assert any(line.startswith("mining: ") for line in lines)
    assert "scoring the test split with the final model" in lines
    assert all(len(line) < 80 for line in batches)


def test_the_summary_is_complete(summary: dict[str, Any], ran: tuple[str, Path]) -> None:
    assert [path.name for path in ran[1].iterdir()] == ["summary.json"]
    assert [phase["name"] for phase in summary["phases"]] == ["phase 1", "phase 2"]
    assert all(
        {"val_ppl", "val_acc", "flops"} <= set(row) for phase in summary["phases"] for row in phase["in_sample_epochs"]
    )
    for split, tokens in (("in_sample", 320), ("held_out", 296)):
        found = summary[split]
        assert found["tokens"] == tokens
        assert 0 < found["hard_tokens"] < tokens
        for line in (found["phase_1"], found["final"]):
            assert all(math.isfinite(line[key]) for key in ("ppl", "acc", "hard_ppl", "flops_per_token"))
        assert found["phase_1"]["shallow_ratio"] == 1.0
        assert found["phase_1"]["compute_cost"] == 0.5
        # The original formula: two of four layers for tokens that leave, all four for the rest.
        final = found["final"]
        assert final["compute_cost"] == pytest.approx(1 - final["shallow_ratio"] / 2, abs=1e-6)
    best = min(row["val_ppl"] for row in summary["phases"][0]["in_sample_epochs"])
    assert summary["in_sample"]["phase_1"]["ppl"] == pytest.approx(best, rel=1e-5)
    last = summary["phases"][1]["in_sample_epochs"][-1]
    assert summary["in_sample"]["final"]["ppl"] == pytest.approx(last["val_ppl"], rel=1e-5)
    final, before = summary["in_sample"]["final"], summary["in_sample"]["phase_1"]["hard_ppl"]
    assert final["improvement"] == pytest.approx(before - final["hard_ppl_as_trained"])
    assert summary["settings"]["num_samples"] == 200
    assert summary["ashem"]["protocol"] == "original"


def test_a_summary_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = colab2.save({"ppl": math.nan, "rows": [{2: math.inf}]}, tmp_path)
    assert json.loads(path.read_text()) == {"ppl": None, "rows": [{"2": None}]}

    def fails(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="full"):
        colab2.save({"ppl": 1.0}, tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["summary.json"]
    assert json.loads(path.read_text())["ppl"] is None


def test_an_existing_folder_is_refused_without_overwrite(
    texts: Path, ran: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "summary.json").write_text("old")
    arguments = [*TINY, "--max-epochs", "1", "--data", str(texts), "--out", str(out)]
    assert colab2.main(arguments) == 2
    printed = capsys.readouterr()
    assert "--overwrite" in printed.err
    assert not printed.out
    assert (out / "summary.json").read_text() == "old"
    assert colab2.main([*arguments, "--overwrite"]) == 0
    assert json.loads((out / "summary.json").read_text())["settings"]["max_epochs"] == 1


def test_bad_input_ends_in_one_sentence(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "run", tmp_path / "file"
    file.touch()
    for arguments, said in (
        (["--data", str(tmp_path / "nowhere")], "no data at"),
        (["--num-samples", "100000"], "num_samples"),
        (["--seed", "-1"], "seed"),
        (["--max-epochs", "0"], "max_epochs"),
        (["--dim", "15"], "dim"),
        (["--out", str(file), "--overwrite"], "file"),
        (["--out", str(file / "below")], "cannot create"),
    ):
        assert colab2.main([*TINY, "--data", str(texts), "--out", str(out), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("colab2.py: ")
        assert said in error
        assert len(error.splitlines()) == 1
        assert not out.exists()  # a failed run leaves no folder that would block the next one
