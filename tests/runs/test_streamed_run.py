"""Recipes on a stream: its text, its batches, and reading it again."""

import gzip
import json
from pathlib import Path

import pytest

from ease import EaseError
from ease.runs.text import StreamedCorpus, load_text

pytest.importorskip("datasets")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """1,500 documents in three files of different formats."""
    texts = [f"document {number} says {'so ' * (number % 7)}much" for number in range(1500)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts[:500]) + "\n", encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in texts[500:1000]))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[1000:]))
    return tmp_path


def streamed(files: Path) -> StreamedCorpus:
    corpus = load_text(f"stream:{files}/*", "byte")
    assert isinstance(corpus, StreamedCorpus)
    return corpus


def test_documents_are_held_out_and_the_others_are_trained_on(files: Path) -> None:
    corpus = streamed(files)
    decode = corpus.tokenizer.decode
    assert decode(corpus.val.tolist()).startswith("document 0 says")
    assert "document 999 says" in decode(corpus.test.tolist())
    assert "document 1000 says" not in decode(corpus.test.tolist())
    batches = corpus.stream.train(seq_len=64, batch_size=4, epoch_batches=20)
    trained = decode([token for batch in batches for token in batch.x.flatten().tolist()])
    assert "document 1" in trained
    assert not any(f"document {number} says" in trained for number in (0, 499, 500, 999))


def test_batches_begin_anew_and_continue_after_epochs(files: Path) -> None:
    corpus, options = streamed(files), {"seq_len": 64, "batch_size": 4, "epoch_batches": 3}
    first, second = corpus.stream.train(**options), corpus.stream.train(**options)
    expected = [batch.x.tolist() for _ in range(3) for batch in first]
    second.pass_over(2)
    assert [batch.x.tolist() for batch in second] == expected[6:]
    assert [batch.x.tolist() for batch in corpus.stream.train(**options)] == expected[:3]


def test_the_hash_tells_other_files_apart(files: Path) -> None:
    before = streamed(files).hash
    assert streamed(files).hash == before
    with (files / "c.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "one more"}\n')
    assert streamed(files).hash != before


def test_what_a_stream_cannot_do_is_said_in_a_sentence(files: Path, tmp_path: Path) -> None:
    with pytest.raises(EaseError, match="max_tokens limits a text that is read as a whole"):
        load_text(f"stream:{files}/*", "byte", max_tokens=10)
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "a.txt").write_text("one document", encoding="utf-8")
    with pytest.raises(EaseError, match="without text: give more than 1000 documents"):
        load_text(f"stream:{tmp_path}/few/*", "byte")
