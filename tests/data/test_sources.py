"""Sources: how each is split, that splits share nothing, and errors that name the fix."""

import json
import sys
from pathlib import Path

import pytest

from ease.data import sources
from ease.data.corpus import load_corpus
from ease.data.sources import SPLITS, read_splits
from ease.errors import EaseError


def test_without_test_txt_the_second_half_of_valid_is_test(folder: Path) -> None:
    (folder / "test.txt").unlink()
    (folder / "valid.txt").write_text("one\ntwo\nthree\nfour\n")
    splits = read_splits(folder)
    assert splits["val"] == ["one\ntwo\nthree\n"]
    assert splits["test"] == ["four\n"]


def test_a_file_is_cut_80_10_10_at_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    lines = [f"line {i:03}\n" for i in range(100)]
    file.write_text("".join(lines))
    splits = read_splits(file)
    assert splits["train"] + splits["val"] + splits["test"] == [
        "".join(lines[a:b]) for a, b in ((0, 81), (81, 91), (91, 100))
    ]


def test_bad_sources_name_the_fix(folder: Path, tmp_path: Path) -> None:
    for source, words in ((tmp_path / "nowhere", "stdlib"), (tmp_path, "train.txt")):
        with pytest.raises(EaseError, match=words):
            read_splits(source)
    one_line = tmp_path / "short.txt"
    one_line.write_text("one line")
    with pytest.raises(EaseError, match="val split"):
        read_splits(one_line)
    (folder / "valid.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EaseError, match=r"valid\.txt"):
        read_splits(folder)
    (folder / "valid.txt").write_text(" \n")
    with pytest.raises(EaseError, match="val split"):
        read_splits(folder)
    (folder / "valid.txt").unlink()
    with pytest.raises(EaseError, match=r"valid\.txt"):
        read_splits(folder)


def test_stdlib_splits_are_real_and_share_no_package(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    def split_of(path: str) -> str:
        seen[path] = split(path)
        return seen[path]

    split = sources._stdlib_split
    monkeypatch.setattr(sources, "_stdlib_split", split_of)
    corpus = load_corpus("stdlib", "bpe:512", cache_dir=cache)

    assert corpus.name.startswith("stdlib-3.")
    assert corpus.vocab_size == 512
    tops = {s: {p.split("/")[0].removesuffix(".py") for p in seen if seen[p] == s} for s in SPLITS}
    assert not (tops["train"] & tops["val"])
    assert not (tops["train"] & tops["test"])
    assert not (tops["val"] & tops["test"])
    sizes = corpus.describe()["tokens"]
    assert sizes["train"] > 1_000_000
    assert all(0.05 < sizes[s] / sum(sizes.values()) < 0.2 and len(tops[s]) > 5 for s in ("val", "test"))
    assert not any({"test", "tests", "site-packages", "encodings", "__pycache__"} & set(p.split("/")) for p in seen)


def test_a_python_without_library_sources_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(EaseError, match="instead of stdlib"):
        read_splits("stdlib")


def write_rows(path: Path, texts: list[str], column: str = "text") -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))


class Hub:
    """A replacement of `datasets.load_dataset` that records its calls and returns rows or raises."""

    def __init__(self, outcome: dict[str, list[str]] | Exception) -> None:
        self.outcome = outcome
        self.calls: list[tuple[str, str | None]] = []

    def __call__(self, name: str, config: str | None, *, streaming: bool) -> dict[str, list[dict[str, str]]]:
        assert streaming
        self.calls.append((name, config))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return {split: [{"text": text} for text in texts] for split, texts in self.outcome.items()}


def put_hub(monkeypatch: pytest.MonkeyPatch, outcome: dict[str, list[str]] | Exception) -> Hub:
    hub = Hub(outcome)
    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", hub)
    return hub


def test_a_local_data_set_is_read_and_split_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    write_rows(tmp_path / "set" / "train.jsonl", [f"row {i}\r\n" for i in range(45)])
    splits = read_splits(f"hf:{tmp_path / 'set'}")
    assert splits["val"] == ["row 0\n", "row 20\n", "row 40\n"]
    assert splits["test"] == ["row 1\n", "row 21\n", "row 41\n"]
    assert len(splits["train"]) == 39
    assert splits["train"][0] == "row 2\n"
    assert load_corpus(f"hf:{tmp_path / 'set'}", "byte", cache_dir=tmp_path).name == "set"

    write_rows(tmp_path / "other" / "train.jsonl", ["x"], column="sentence")
    with pytest.raises(EaseError, match="sentence"):
        read_splits(f"hf:{tmp_path / 'other'}")


def test_a_hub_data_set_is_read_as_far_as_needed_and_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"train": ["ten chars."] * 1000, "validation": ["held out"] * 3}
    hub = put_hub(monkeypatch, rows)
    splits = read_splits("hf:owner/name/config", max_tokens=100)
    assert hub.calls == [("owner/name", "config")]
    assert len(splits["train"]) == 80
    assert splits["val"] == rows["validation"]
    assert len(splits["test"]) == 5

    corpus = load_corpus("hf:owner/name", "byte", max_tokens=100, cache_dir=cache)
    assert corpus.name == "hf:owner/name"
    assert len(corpus.train) == 100
    put_hub(monkeypatch, ConnectionError("no network"))
    assert load_corpus("hf:owner/name", "byte", max_tokens=100, cache_dir=cache).hash == corpus.hash


def test_wikitext_has_one_document_per_split(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["", " = Title = \n", "", " Text .\n"]
    hub = put_hub(monkeypatch, {"train": lines, "validation": lines, "test": lines})
    assert read_splits("wikitext-103")["test"] == [" = Title = \n Text .\n"]
    assert hub.calls == [("Salesforce/wikitext", "wikitext-103-raw-v1")]


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach it"), ValueError("unknown config"), OSError()])
def test_errors_of_the_hub_name_local_sources(error: Exception, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_hub(monkeypatch, error)
    with pytest.raises(EaseError, match=r"--data DIR.*stdlib"):
        load_corpus("wikitext-2", cache_dir=cache)


def test_data_sets_without_train_and_a_missing_library_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    put_hub(monkeypatch, {"test": ["x"]})
    with pytest.raises(EaseError, match="no split 'train'"):
        read_splits("hf:owner/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EaseError, match=r"package datasets: pip install -e '\.\[hf\]'"):
        read_splits("wikitext-2")
