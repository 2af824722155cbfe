"""Sources: how each is split, that splits share nothing, and errors that name the fix."""

import csv
import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("text", ["anarchism originated " * 500, "x" * 10_000, "short\n" + "\u6f22" * 5000])
def test_a_long_line_is_cut_by_length(text: str, tmp_path: Path) -> None:
    file = tmp_path / "text8"
    file.write_text(text, encoding="utf-8")
    splits = read_splits(file)
    parts = [splits[split][0] for split in SPLITS]
    assert "".join(parts) == text
    assert [len(part) / len(text) for part in parts] == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    if " " in text:
        assert all(part.endswith(" ") for part in parts)


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz"])
@pytest.mark.parametrize("in_folder", [False, True])
def test_files_of_records_give_one_document_a_record(suffix: str, in_folder: bool, tmp_path: Path) -> None:
    rows = [{"n": i, "text": f'row {i}, "quoted"\nits second line'} for i in range(45)]
    parts = {"train": rows[:39], "valid": rows[39:]} if in_folder else {"one": rows}
    for name, part in parts.items():
        write_records(tmp_path / f"{name}{suffix}", part)
    splits = read_splits(tmp_path if in_folder else tmp_path / f"one{suffix}")
    texts = [row["text"] for row in rows]
    if in_folder:
        assert splits == {"train": texts[:39], "val": texts[39:42], "test": texts[42:]}
    else:
        assert splits["val"] == [texts[0], texts[20], texts[40]]
        assert splits["test"] == [texts[1], texts[21], texts[41]]
        assert len(splits["train"]) == 39


def test_a_record_without_a_text_is_skipped_by_name_and_many_are_refused(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": f"row {i}"} for i in range(100)]
    rows[7], rows[50] = {"text": None}, {"id": 3}
    write_records(tmp_path / "a.jsonl", rows)
    with pytest.warns(UserWarning, match="skipped") as told:
        splits = read_splits(tmp_path / "a.jsonl")
    assert [str(each.message) for each in told] == [
        f"{tmp_path / 'a.jsonl'}:8 has a null as text and is skipped (1 of 8 records of {tmp_path / 'a.jsonl'} so far)",
        f"2 of 100 records of {tmp_path / 'a.jsonl'} have no text and are skipped",
    ]
    assert sum(map(len, splits.values())) == 98
    write_records(tmp_path / "b.csv", [{"id": i, "sentence": "x"} for i in range(100)])
    with pytest.raises(EaseError, match=r"no text column 'text' in 100 of 100 records, more than 10% .*id, sentence"):
        read_splits(tmp_path / "b.csv")
    write_records(tmp_path / "c.jsonl", [{"prompt": "x", "completion": "y"}] * 20)
    with pytest.raises(EaseError, match=r"has the columns prompt, completion; `ease.load_completion` reads"):
        read_splits(tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"cannot read .*a.jsonl:2 as JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]', r"cannot read .*a.jsonl:2: give a JSON object"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "is in UTF-16: convert it"),
        ("a.json", b"[1]", r"cannot read .*a.json, record 1"),
        ("a.csv", b"text\n\xff\n", "convert it to UTF-8"),
        ("a.parquet", b"PAR1 and no more", r"cannot read .*a.parquet"),
        ("a.jsonl.gz", b"no gzip", r"cannot read .*a.jsonl.gz"),
        ("a.jsonl", b"", "leaves the train split without text"),
        ("a.txt", "words\n".encode("utf-16"), "is in UTF-16: convert it"),
        ("a.txt", "words\n".encode("utf-16-le"), "holds NUL characters"),
        ("a.txt", b"", "leaves the train split without text"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EaseError, match=says) as error:
        read_splits(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("same", "pair"),
    [(("train", "valid", "test"), "val"), (("train", "test"), "test"), (("valid", "test"), "test")],
)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_splits_with_the_same_text_are_refused_by_name(
    same: tuple[str, ...], pair: str, suffix: str, tmp_path: Path
) -> None:
    for name in ("train", "valid", "test"):
        lines = [f"line {i} of {'one' if name in same else name}\n" for i in range(50)]
        if suffix == ".txt":
            (tmp_path / f"{name}.txt").write_text("".join(lines), newline="\r\n" if name == "test" else None)
        else:
            write_records(tmp_path / f"{name}.jsonl", [{"text": line} for line in lines])
    names = {"valid": "val"}
    first, second = (names.get(name, name) for name in same[:2])
    with pytest.raises(EaseError, match=rf"100% of {first} is also in {second}\).*--allow-overlap"):
        load_corpus(tmp_path, "byte", cache_dir=tmp_path / "cache")
    assert load_corpus(tmp_path, "byte", cache_dir=tmp_path / "cache", allow_overlap=True).val.numel()


def test_a_part_of_another_split_and_both_formats_are_refused(tmp_path: Path) -> None:
    lines = [f"line {i}\n" for i in range(100)]
    (tmp_path / "train.txt").write_text("".join(lines))
    (tmp_path / "valid.txt").write_text("".join([*lines[20:32], *(f"other {i}\n" for i in range(8))]))
    with pytest.raises(EaseError, match=r"of val is also in train"):
        read_splits(tmp_path)
    write_records(tmp_path / "train.jsonl", [{"text": "a"}])
    with pytest.raises(EaseError, match=r"has train.jsonl and train.txt: leave one of them there"):
        read_splits(tmp_path)


def write_records(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes records in the format that the name asks for."""
    form = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
        return
    if form == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif form == "json":
        text = json.dumps(rows, indent=1)
    else:
        out = io.StringIO()
        table = csv.DictWriter(out, list(rows[0]), delimiter="\t" if form == "tsv" else ",")
        table.writeheader()
        table.writerows(rows)
        text = out.getvalue()
    data = b"\xef\xbb\xbf" + text.encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)


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
