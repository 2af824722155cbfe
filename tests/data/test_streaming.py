"""Streams: what a packed row holds, what is held out, bounded buffers, and exact resumption anywhere."""

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, normalizers
from tokenizers.models import WordLevel

from ease import Batch, Data, EaseError, StandardConfig, StandardTransformer, score, train
from ease.data.streaming import Packer, Stream, StreamBatches, batch_of, documents, load_stream, open_stream

datasets = pytest.importorskip("datasets")
Make = Callable[..., StandardTransformer]
OPTIONS: dict[str, Any] = {"seq_len": 16, "batch_size": 3, "epoch_batches": 5, "held_out": 4, "buffer": 8}


def text(i: int) -> str:
    return f"<{i}> " + "ab cd ef "[: i % 10] * (1 + i % 7)


@pytest.fixture(params=["jsonl", "parquet"])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """60 documents in three files."""
    for part in range(3):
        rows = [{"text": text(i), "n": i} for i in range(20 * part, 20 * part + 20)]
        path = tmp_path / f"part{part}.{request.param}"
        if request.param == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            datasets.Dataset.from_list(rows).to_parquet(path, batch_size=7)
    return str(tmp_path / f"*.{request.param}")


def segments(batches: Any) -> list[tuple[list[int], list[int]]]:
    """Ids and targets of each segment, row by row; also checks the positions."""
    found = []
    for x, y, *_, layout, _ in batches:
        for row in range(len(x)):
            for segment in layout.segments[row].unique().tolist():
                inside = layout.segments[row] == segment
                if segment == -1:
                    assert (y[row][inside] == -100).all()
                    continue
                assert layout.positions[row][inside].tolist() == list(range(int(inside.sum())))
                found.append((x[row][inside].tolist(), y[row][inside].tolist()))
    return found


def same(a: Batch, b: Batch) -> bool:
    assert a.layout is not None
    assert b.layout is not None
    pairs = ((a.x, b.x), (a.y, b.y), (a.layout.positions, b.layout.positions), (a.layout.segments, b.layout.segments))
    return all(torch.equal(*pair) for pair in pairs)


# ---------------------------------------------------------------------------------------------------------
# Rows


def test_rows_are_full_and_documents_are_segments() -> None:
    made = [torch.arange(100 * i, 100 * i + n, dtype=torch.int32) for i, n in enumerate((3, 9, 1, 4))]
    packer = Packer(iter(made), 5)
    batch = batch_of(list(iter(packer.row, None)))
    assert batch.x.tolist() == [
        [0, 1, 2, 100, 101],
        [102, 103, 104, 105, 106],
        [107, 108, 200, 300, 301],
        [302, 303, 0, 0, 0],
    ]
    assert batch.y.tolist() == [
        [1, 2, -100, 101, 102],
        [103, 104, 105, 106, 107],
        [108, -100, -100, 301, 302],
        [303, -100, -100, -100, -100],
    ]
    assert batch.layout is not None
    assert batch.layout.segments.tolist() == [[0, 0, 0, 1, 1], [0] * 5, [0, 0, 1, 2, 2], [0, 0, -1, -1, -1]]
    assert batch.layout.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4], [0, 1, 0, 0, 1], [0, 1, 0, 1, 2]]


@torch.no_grad()
def test_a_document_without_tokens_does_not_end_the_stream(tmp_path: Path) -> None:
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace("\u200b", "")
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ("a", "\u200b", "\u200b", "b"))
    )
    rows = datasets.load_dataset("json", data_files=str(tmp_path / "texts.jsonl"), split="train", streaming=True)
    assert [ids.tolist() for ids in documents("texts", rows, tokenizer, None)] == [[1], [2]]


def test_no_token_sees_another_document(tiny: Make) -> None:
    model = tiny(2, sharp=True)
    made = [torch.randint(256, (n,), dtype=torch.int32) for n in (5, 7, 4)]
    batch = batch_of(list(iter(Packer(iter(made), 16).row, None)))
    alone = torch.cat(
        [F.cross_entropy(model(ids[None, :-1].long())[0], ids[1:].long(), reduction="none") for ids in made]
    )
    torch.testing.assert_close(score(model, [batch]).losses, alone)


# ---------------------------------------------------------------------------------------------------------
# Splits


def test_a_pass_trains_on_every_document_once_except_held_out_ones(corpus: str) -> None:
    stream = load_stream(corpus, "byte", **OPTIONS | {"buffer": 1})
    decode = stream.tokenizer.decode

    def texts(batches: Any) -> str:
        return "".join(decode([i for i in ids if i > 0], skip_special_tokens=False) for ids, _ in segments(batches))

    assert texts(stream.val) == "".join(text(i) + "<eos>" for i in range(4))
    assert texts(stream.test) == "".join(text(i) + "<eos>" for i in range(4, 8))
    learned = texts(batch for _ in range(20) for batch in stream.train)
    once = "".join(text(i) + "<eos>" for i in range(8, 60))
    assert len(learned) > 2 * len(once)
    assert learned.startswith(once * 2)
    for ids, targets in segments(stream.train):
        assert targets[:-1] == ids[1:]
        assert (targets[-1] == -100) is (ids[-1] == stream.eos)


def test_a_corpus_keeps_its_own_splits(tmp_path: Path) -> None:
    for name, start in (("train", 0), ("validation", 100), ("test", 200)):
        rows = [{"text": text(i)} for i in range(start, start + 20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = load_stream(f"hf:{tmp_path}", "byte", **OPTIONS | {"buffer": 1})
    starts = [stream.tokenizer.decode(segments(part)[0][0]) for part in (stream.train, stream.val, stream.test)]
    assert [start[:4] for start in starts] == ["<0> ", "<100", "<200"]


def test_the_seed_determines_the_order_and_the_buffer_shuffles(corpus: str) -> None:
    first, again, other = (list(load_stream(corpus, "byte", seed=seed, **OPTIONS).train) for seed in (0, 0, 1))
    plain = list(load_stream(corpus, "byte", **OPTIONS | {"buffer": 1}).train)
    assert all(same(a, b) for a, b in zip(first, again))
    assert not any(same(a, b) for a, b in zip(first, other))
    assert not any(same(a, b) for a, b in zip(first, plain))


# ---------------------------------------------------------------------------------------------------------
# Memory and resumption


def test_no_more_rows_are_held_than_the_buffer(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, sizes = load_stream(corpus, "byte", **OPTIONS), []
    packed, given = Packer.row, 0
    read = 0

    def row(packer: Packer) -> torch.Tensor | None:
        nonlocal read
        read += 1
        sizes.append(read - given)  # rows read and not yet in a batch
        return packed(packer)

    monkeypatch.setattr(Packer, "row", row)
    batches = iter(stream.train)
    for _ in range(5):
        batch = next(batches)
        sizes.append(len(stream.train.held) + len(batch.x))
        given += len(batch.x)
    assert max(sizes) == 8 + 3 - 1  # the buffer, and the batch that is being drawn from it
    assert stream.train.held[0].untyped_storage().nbytes() == 3 * 16 * 4


def test_documents_read_ahead_change_no_batch_and_are_part_of_the_state(corpus: str) -> None:
    opened = open_stream(corpus, "byte", held_out=4)
    options = {"seq_len": 16, "batch_size": 3, "epoch_batches": 5, "buffer": 8}
    plain = opened.train(**options)
    ahead = opened.train(**options, encode_all=lambda encode, texts: list(map(encode, texts)))
    expected = [batch for _ in range(9) for batch in plain]
    found = list(ahead)
    state = copy.deepcopy(ahead.state_dict())
    assert sum(map(len, state["ahead"])) > 100
    found += ahead
    resumed = opened.train(**options)  # one process goes on alone
    resumed.load_state_dict(state)
    assert all(map(same, expected, found))
    assert all(map(same, expected[5:], [batch for _ in range(8) for batch in resumed]))
    assert resumed.passes >= 1


def test_an_error_of_the_exchange_is_not_taken_for_one_of_the_data_set(corpus: str) -> None:
    def encode_all(encode: Callable[[str], torch.Tensor], texts: Sequence[str]) -> list[torch.Tensor]:
        raise RuntimeError("gloo: connection closed by peer")

    stream = open_stream(corpus, "byte", held_out=4).train(
        seq_len=16, batch_size=3, epoch_batches=5, encode_all=encode_all
    )
    with pytest.raises(RuntimeError, match=r"^gloo"):
        next(iter(stream))


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 13, 31])
def test_a_stream_resumes_bit_identically_from_its_state(
    taken: int, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ease.data.streaming.TOKENIZER_DOCUMENTS", 5)

    def batches(stream: StreamBatches) -> Any:
        while True:
            yield from stream

    whole = load_stream(corpus, "bpe:300", **OPTIONS).train
    endless = batches(whole)
    for _ in range(taken):
        next(endless)
    state = whole.state_dict()
    kept = copy.deepcopy(state)
    expected = list(islice(endless, 60))
    assert whole.passes >= 2  # the documents have started again
    assert repr(state) == repr(kept)

    resumed = load_stream(corpus, "bpe:300", **OPTIONS).train
    next(iter(resumed))  # the state replaces any position
    resumed.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(expected, islice(batches(resumed), 60), strict=True))
    assert repr(state) == repr(kept)


def test_a_state_can_be_saved_as_data(corpus: str, tmp_path: Path) -> None:
    stream = load_stream(corpus, "byte", **OPTIONS).train
    next(iter(stream))
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = load_stream(corpus, "byte", **OPTIONS).train
    resumed.load_state_dict(state)
    assert same(next(iter(resumed)), next(iter(stream)))
    with pytest.raises(EaseError, match="the state holds 7 rows of 16 tokens, and the stream is set to 8 of 32"):
        load_stream(corpus, "byte", **OPTIONS | {"seq_len": 32}).train.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------
# Training and bad input


def test_a_strategy_trains_on_a_stream(corpus: str) -> None:
    stream: Stream = load_stream(corpus, "byte", **OPTIONS | {"epoch_batches": 30})
    model = StandardTransformer(stream.tokenizer.get_vocab_size(), dim=32, num_layers=1)
    before = score(model, stream.test).metrics()["ppl"]
    config = StandardConfig(num_layers=1, lr=3e-3, max_epochs=3)
    ((_, history),) = train(model, config.strategy(), Data(stream.train, stream.val))
    assert history.steps == 90
    assert score(model, stream.test).metrics()["ppl"] < 0.3 * before


def test_a_row_without_a_text_is_skipped_by_name_and_many_end_a_training_that_resumes(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": text(i)} for i in range(60)]
    path = tmp_path / "rows.jsonl"

    def write(bad: list[int]) -> None:
        path.write_text("".join(json.dumps({"text": None} if i in bad else row) + "\n" for i, row in enumerate(rows)))

    def stream() -> Stream:
        return load_stream(str(path), "byte", **OPTIONS | {"epoch_batches": 30})

    write([40])
    with pytest.warns(UserWarning, match=r"rows.jsonl:41 has a null as text and is skipped \(1 of 33 records"):
        list(stream().train)

    config = StandardConfig(num_layers=1, max_epochs=2)

    def weights() -> list[Any]:
        torch.manual_seed(0)
        made = stream()
        model = StandardTransformer(made.tokenizer.get_vocab_size(), dim=32, num_layers=1)
        list(train(model, config.strategy(), Data(made.train, made.val), checkpoints=tmp_path / "kept"))
        return [value.tolist() for value in model.parameters()]

    write([])
    whole = weights()
    shutil.rmtree(tmp_path / "kept")
    write(list(range(40, 60)))
    with pytest.raises(EaseError, match=r"20 of 52 records"):
        weights()
    write([])
    assert weights() == whole


def test_splits_with_the_same_documents_are_refused_by_name(tmp_path: Path) -> None:
    for name, start in (("train", 0), ("validation", 100), ("test", 0)):
        rows = [{"text": text(i)} for i in range(start, start + 20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(EaseError, match=r"of test is also in train\).*allow_overlap=True"):
        load_stream(f"hf:{tmp_path}", "byte", **OPTIONS)
    assert load_stream(f"hf:{tmp_path}", "byte", **OPTIONS, allow_overlap=True).test


def test_bad_streams_are_reported_in_one_sentence(tmp_path: Path) -> None:
    def refused(message: str, source: str, **options: Any) -> None:
        with pytest.raises(EaseError, match=message) as error:
            list(load_stream(source, "byte", **OPTIONS | options).train)
        assert "\n" not in str(error.value)

    refused("no stream of documents at", str(tmp_path / "none.jsonl"))
    (tmp_path / "a.pdf").write_text("text")
    refused(r"use hf:NAME/CONFIG, or .jsonl, .parquet or .txt", str(tmp_path / "a.pdf"))
    lines = [json.dumps({"text": text(i)}) for i in range(20)]
    path = tmp_path / "b.jsonl"
    path.write_text("\n".join([*lines, '{"text": ', ""]))
    refused(r"cannot read .*b.jsonl", str(path))
    path.write_text("\n".join(lines).replace("text", "words"))
    refused(r"b.jsonl has no text column 'text'", str(path))
    path.write_text("\n".join(lines[:3]))
    refused("leaves the test split without text", str(path))
    path.write_text("\n".join(lines[:8]))
    refused("no text to train on", str(path))
    path.write_text("\n".join(lines))
    refused("held_out must be at least 1", str(path), held_out=0)
    refused("buffer must be at least 1", str(path), buffer=0)
