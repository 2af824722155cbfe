"""A corpus: what its splits hold, what its hash depends on, and the cache."""

import json
from pathlib import Path

import pytest
import torch

from ease.data import corpus as corpus_module
from ease.data.corpus import load_corpus
from ease.data.tokenizers import train_tokenizer
from ease.errors import EaseError


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
    (folder / "test.txt").write_text("xyz " * 500)
    assert load_corpus(folder, "bpe:280", cache_dir=cache).tokenizer.to_str() == before


def test_the_hash_depends_on_text_tokenizer_and_max_tokens(folder: Path, cache: Path) -> None:
    hashes = [load_corpus(folder, "byte", cache_dir=cache).hash]
    assert load_corpus(folder, "byte", cache_dir=cache / "other").hash == hashes[0]
    hashes.append(load_corpus(folder, "word", cache_dir=cache).hash)
    hashes.append(load_corpus(folder, "byte", max_tokens=50, cache_dir=cache).hash)
    (folder / "test.txt").write_text("another text\n")
    hashes.append(load_corpus(folder, "byte", cache_dir=cache).hash)
    assert len(set(hashes)) == 4


def test_max_tokens_limits_train_alone(folder: Path, cache: Path) -> None:
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

    monkeypatch.setattr(corpus_module, "train_tokenizer", train)
    first = load_corpus(folder, "bpe:280")
    load_corpus(folder, "bpe:280")
    (file,) = cache.iterdir()  # no temporary file is left
    assert len(trained) == 1

    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    narrower = whole.replace(b"'<i4'", b"'<i2'", 1)  # numpy alone would read half of the ids without an error
    damaged = [b"", b"junk", whole[:middle], flipped, narrower]
    for i, content in enumerate(damaged):
        file.write_bytes(content)
        again = load_corpus(folder, "bpe:280")
        assert len(trained) == i + 2
        assert file.read_bytes()[:4] == whole[:4]
        assert torch.equal(again.train, first.train)
        assert again.hash == first.hash


def test_a_cache_that_cannot_be_written_gives_a_warning(folder: Path) -> None:
    with pytest.warns(UserWarning, match="EASE_CACHE"):
        assert len(load_corpus(folder, "byte", cache_dir=folder / "train.txt").train)


def test_windows_line_ends_give_the_same_corpus(folder: Path, cache: Path) -> None:
    unix = load_corpus(folder, "bpe:280", cache_dir=cache)
    for file in folder.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))  # and a byte order mark
    assert load_corpus(folder, "bpe:280", cache_dir=cache).hash == unix.hash
