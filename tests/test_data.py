"""Corpora, tokenizers and batches: what goes in comes out, and no split sees another."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ease.data import sources as data
from ease.data.batches import TokenBatches
from ease.data.corpus import load_corpus
from ease.data.sources import read_splits
from ease.data.tokenizers import load_tokenizer, token_strings, train_tokenizer
from ease.errors import EaseError

TEXT = "the cat sat on the mat,\nand then the dog sat on the cat.\n\n    def f(x): return x\n" * 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder of three different texts."""
    here = tmp_path / "books"
    here.mkdir()
    for name, text in (("train", TEXT), ("valid", TEXT[:900].upper()), ("test", TEXT[:600].title())):
        (here / f"{name}.txt").write_text(text, encoding="utf-8")
    return here


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# Tokenizers


BPE, BYTE = train_tokenizer("bpe:280", [TEXT]), train_tokenizer("byte", [TEXT])


@given(st.text())
def test_bpe_and_byte_decode_to_the_same_text(text: str) -> None:
    for tok in (BPE, BYTE):
        assert tok.decode(tok.encode(text).ids) == text
    assert len(BYTE.encode(text).ids) == len(text.encode())


@pytest.mark.parametrize("text", ["a<eos>b<pad>c<unk>", "\r\n\t  x \n", "é 日本 🙂", "\ufeff\x00"])
def test_a_special_token_in_the_text_is_text(text: str) -> None:
    for tok in (BPE, BYTE):
        ids = tok.encode(text).ids
        assert tok.decode(ids) == text
        assert min(ids) >= 2
        assert tok.encode_batch_fast([text])[0].ids == ids


def test_sizes_and_special_ids() -> None:
    word = train_tokenizer("word", ["The cat <unk> the <eos>", "é cat"])
    for tok, size in ((BPE, 280), (BYTE, 258), (word, 3 + 4)):
        vocab = tok.get_vocab()
        assert tok.get_vocab_size() == size
        assert sorted(vocab.values()) == list(range(size))
        assert (vocab["<pad>"], vocab["<eos>"]) == (0, 1)
    assert word.encode("the dog <unk> The").ids == [word.token_to_id(w) for w in ("the", "<unk>", "<unk>", "The")]


def test_training_is_deterministic() -> None:
    assert train_tokenizer("bpe:280", [TEXT]).to_str() == BPE.to_str()


def test_token_strings_join_to_the_text() -> None:
    word = train_tokenizer("word", ["the cat sat"])
    for tok, text in ((BPE, " the cat\n\n sat  on"), (BYTE, "the cat"), (word, "the cat sat")):
        assert "".join(token_strings(tok, tok.encode(text).ids)) == text
    assert token_strings(BYTE, BYTE.encode("aé").ids) == ["a", "\ufffd", "\ufffd"]
    assert token_strings(BPE, [1, *BPE.encode("the").ids])[0] == "<eos>"
    assert token_strings(BPE, []) == []


def test_token_strings_keep_the_spaces_of_a_sentencepiece_tokenizer() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tok = Tokenizer(models.WordLevel({"<unk>": 0, "▁the": 1, "▁cat": 2, "▁a": 3}, unk_token="<unk>"))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert token_strings(tok, tok.encode("the cat the").ids) == ["the", " cat", " the"]


def test_a_saved_tokenizer_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    BPE.save(str(path))
    back = load_tokenizer(path)
    assert back.to_str() == BPE.to_str()
    assert back.decode(back.encode("<eos> x").ids) == "<eos> x"
    path.write_text("{")
    for bad in (path, tmp_path / "missing.json"):
        with pytest.raises(EaseError, match="tokenizer"):
            load_tokenizer(bad)


@pytest.mark.parametrize("spec", ["", "bpe", "bpe:", "bpe:258", "bpe:-1", "bpe:x", "gpt2", "word:5", "byte:1"])
def test_unknown_tokenizers_are_refused_before_reading(spec: str, cache: Path) -> None:
    with pytest.raises(EaseError, match="bpe:N"):
        load_corpus("nowhere", spec, cache_dir=cache)


def test_long_texts_are_tokenized_in_pieces_that_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CHUNK_CHARS", 10)
    ids = data.encode(BPE, [TEXT, "no line end", ""], BPE.token_to_id(data.EOS))
    assert ids[-1] == 1
    assert (ids == 1).sum() == 3
    assert BPE.decode(ids.tolist()) == TEXT + "no line end"


# Corpora


def test_a_folder_becomes_a_corpus(folder: Path, cache: Path) -> None:
    corpus = load_corpus(folder, "bpe:280", cache_dir=cache)
    assert (corpus.name, corpus.tokenizer_spec, corpus.vocab_size) == ("books", "bpe:280", 280)
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        ids = getattr(corpus, split)
        assert ids.dtype == torch.int32
        assert ids.dim() == 1
        assert ids.min() >= 0
        assert ids.max() < 280
        assert ids[-1] == corpus.tokenizer.token_to_id("<eos>")
        assert corpus.tokenizer.decode(ids.tolist()) == (folder / f"{name}.txt").read_text()
    described = corpus.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["tokens"] == {s: len(getattr(corpus, s)) for s in ("train", "val", "test")}


def test_the_tokenizer_learns_from_train_alone(folder: Path, cache: Path) -> None:
    before = load_corpus(folder, "bpe:280", cache_dir=cache).tokenizer.to_str()
    (folder / "valid.txt").write_text("zyx " * 500)
    (folder / "test.txt").write_text("zyx " * 500)
    assert load_corpus(folder, "bpe:280", cache_dir=cache).tokenizer.to_str() == before


def test_the_hash_follows_the_text_and_the_tokenizer(folder: Path, cache: Path) -> None:
    hashes = [load_corpus(folder, "byte", cache_dir=cache).hash]
    assert load_corpus(folder, "byte", cache_dir=cache / "other").hash == hashes[0]
    hashes.append(load_corpus(folder, "word", cache_dir=cache).hash)
    hashes.append(load_corpus(folder, "byte", max_tokens=50, cache_dir=cache).hash)
    (folder / "test.txt").write_text("another text\n")
    hashes.append(load_corpus(folder, "byte", cache_dir=cache).hash)
    assert len(set(hashes)) == 4


def test_max_tokens_keeps_the_first_of_train_and_all_that_is_held_out(folder: Path, cache: Path) -> None:
    whole = load_corpus(folder, "bpe:280", cache_dir=cache)
    part = load_corpus(folder, "bpe:280", max_tokens=50, cache_dir=cache)
    assert torch.equal(part.train, whole.train[:50])
    assert torch.equal(part.val, whole.val)
    with pytest.raises(EaseError, match="max_tokens"):
        load_corpus(folder, max_tokens=0, cache_dir=cache)


def test_the_cache_is_used_and_rebuilt_when_damaged(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASE_CACHE", str(cache))
    trained: list[str] = []

    def train(spec: str, texts: list[str]) -> object:
        trained.append(spec)
        return train_tokenizer(spec, texts)

    monkeypatch.setattr(data, "train_tokenizer", train)
    first = load_corpus(folder, "bpe:280")
    load_corpus(folder, "bpe:280")
    (file,) = cache.iterdir()  # one file, and nothing temporary is left
    assert len(trained) == 1

    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    narrower = whole.replace(b"'<i4'", b"'<i2'", 1)  # numpy alone would read half of the ids and be content
    damaged = [b"", b"junk", whole[:middle], flipped, narrower]
    for i, content in enumerate(damaged):
        file.write_bytes(content)
        again = load_corpus(folder, "bpe:280")
        assert len(trained) == i + 2
        assert file.read_bytes()[:4] == whole[:4]
        assert torch.equal(again.train, first.train)
        assert again.hash == first.hash


def test_a_cache_that_cannot_be_written_costs_a_warning(folder: Path) -> None:
    with pytest.warns(UserWarning, match="EASE_CACHE"):
        assert len(load_corpus(folder, "byte", cache_dir=folder / "train.txt").train)


def test_windows_line_ends_give_the_same_corpus(folder: Path, cache: Path) -> None:
    unix = load_corpus(folder, "bpe:280", cache_dir=cache)
    for file in folder.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))  # and a byte order mark
    assert load_corpus(folder, "bpe:280", cache_dir=cache).hash == unix.hash


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


# The standard library


def test_stdlib_splits_are_real_and_share_no_package(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    def split_of(path: str) -> str:
        seen[path] = split(path)
        return seen[path]

    split = data._stdlib_split
    monkeypatch.setattr(data, "_stdlib_split", split_of)
    corpus = load_corpus("stdlib", "bpe:512", cache_dir=cache)

    assert corpus.name.startswith("stdlib-3.")
    assert corpus.vocab_size == 512
    tops = {s: {p.split("/")[0].removesuffix(".py") for p in seen if seen[p] == s} for s in data.SPLITS}
    assert not (tops["train"] & tops["val"])
    assert not (tops["train"] & tops["test"])
    assert not (tops["val"] & tops["test"])
    sizes = corpus.describe()["tokens"]
    assert sizes["train"] > 1_000_000
    assert all(0.05 < sizes[s] / sum(sizes.values()) < 0.2 and len(tops[s]) > 5 for s in ("val", "test"))
    assert not any({"test", "tests", "site-packages", "encodings", "__pycache__"} & set(p.split("/")) for p in seen)


def test_a_python_without_its_sources_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(EaseError, match="instead of stdlib"):
        read_splits("stdlib")


# Hugging Face data sets


def write_rows(path: Path, texts: list[str], column: str = "text") -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))


class Hub:
    """Stands in for `datasets.load_dataset`: keeps the calls and hands out rows, or raises."""

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


def test_wikitext_is_one_document_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["", " = Title = \n", "", " Text .\n"]
    hub = put_hub(monkeypatch, {"train": lines, "validation": lines, "test": lines})
    assert read_splits("wikitext-103")["test"] == [" = Title = \n Text .\n"]
    assert hub.calls == [("Salesforce/wikitext", "wikitext-103-raw-v1")]


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach it"), ValueError("unknown config"), OSError()])
def test_a_hub_out_of_reach_names_the_local_ways(
    error: Exception, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_hub(monkeypatch, error)
    with pytest.raises(EaseError, match=r"--data DIR.*stdlib"):
        load_corpus("wikitext-2", cache_dir=cache)


def test_hub_sets_without_train_or_text_and_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    put_hub(monkeypatch, {"test": ["x"]})
    with pytest.raises(EaseError, match="no split 'train'"):
        read_splits("hf:owner/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EaseError, match=r"package datasets: pip install -e '\.\[hf\]'"):
        read_splits("wikitext-2")


# Batches


@given(st.integers(2, 200), st.integers(1, 9), st.integers(1, 5), st.booleans(), st.booleans())
def test_a_pass_predicts_each_token_once(tokens: int, T: int, B: int, shuffle: bool, drop_last: bool) -> None:
    ids = torch.arange(tokens, dtype=torch.int32)
    windows = (tokens - 1) // T
    if windows < (B if drop_last else 1):
        with pytest.raises(EaseError, match="smaller"):
            TokenBatches(ids, T, B, shuffle=shuffle, drop_last=drop_last)
        return
    batches = TokenBatches(ids, T, B, shuffle=shuffle, drop_last=drop_last)
    got = list(batches)
    assert len(got) == len(batches) == (windows // B if drop_last else -(-windows // B))
    for x, y in got:
        assert x.dtype == y.dtype == torch.int64
        assert x.is_contiguous()
        assert y.is_contiguous()
        assert x.shape == y.shape
        assert x.shape[1] == T
        assert x.shape[0] == B or not drop_last
        assert torch.equal(x + 1, y)
        assert bool((x[:, 0] % T == 0).all())
    seen = torch.cat([y.flatten() for _, y in got]).tolist()
    assert len(seen) == len(set(seen)) == (windows // B * B if drop_last else windows) * T
    if not shuffle:
        assert seen == list(range(1, len(seen) + 1))


def starts(batches: TokenBatches) -> list[int]:
    return [int(i) for x, _ in batches for i in x[:, 0]]


def test_shuffle_is_set_by_the_seed_and_new_in_every_epoch() -> None:
    ids = torch.arange(401)
    one, two = (TokenBatches(ids, 4, 5, shuffle=True, seed=7) for _ in range(2))
    first, second = starts(one), starts(one)
    assert sorted(first) == sorted(second) == list(range(0, 400, 4))
    assert first != second
    assert [starts(two), starts(two)] == [first, second]
    assert starts(TokenBatches(ids, 4, 5, shuffle=True, seed=8)) != first
    two.epoch = 1
    assert one.epoch == 2
    assert starts(two) == second
    plain = TokenBatches(ids, 4, 5)
    assert starts(plain) == starts(plain) == list(range(0, 400, 4))


def test_max_batches_slices_a_pass() -> None:
    ids = torch.arange(41)  # 10 windows of 4, 5 batches of 2
    batches = TokenBatches(ids, 4, 2, shuffle=True, max_batches=2)
    assert len(batches) == 2
    stream = [start for _ in range(5) for start in starts(batches)]  # two passes
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(0, 40, 4))
    whole = TokenBatches(ids, 4, 2, shuffle=True)
    assert stream == starts(whole) + starts(whole)

    plain = TokenBatches(ids, 4, 2, max_batches=2)
    assert starts(plain) == starts(plain) == [0, 4, 8, 12]
    assert len(TokenBatches(ids, 4, 2, max_batches=99)) == 5


@pytest.mark.parametrize("bad", [{"seq_len": 0}, {"batch_size": 0}, {"max_batches": 0}, {"seed": -1}])
def test_batches_refuse_sizes_below_their_least(bad: dict[str, int]) -> None:
    sizes: dict[str, Any] = {"seq_len": 4, "batch_size": 2, **bad}
    with pytest.raises(EaseError, match=next(iter(bad))):
        TokenBatches(torch.arange(100), **sizes)


def test_batches_refuse_what_is_not_a_row_of_ids() -> None:
    for ids in (torch.zeros(100), torch.zeros(10, 10, dtype=torch.int64)):
        with pytest.raises(EaseError, match="1-D"):
            TokenBatches(ids, 4, 2)
