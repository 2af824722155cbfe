"""Tokenizers: decoding gives back the text, special tokens in a text stay text, and training is deterministic."""

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ease.data import tokenizers
from ease.data.corpus import load_corpus
from ease.data.tokenizers import load_tokenizer, token_strings, train_tokenizer
from ease.errors import EaseError

TEXT = "the cat sat on the mat,\nand then the dog sat on the cat.\n\n    def f(x): return x\n" * 30
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
    monkeypatch.setattr(tokenizers, "CHUNK_CHARS", 10)
    ids = tokenizers.encode(BPE, [TEXT, "no line end", ""], BPE.token_to_id(tokenizers.EOS))
    assert ids[-1] == 1
    assert (ids == 1).sum() == 3
    assert BPE.decode(ids.tolist()) == TEXT + "no line end"


def trained_whole(text: str) -> str:
    """The tokenizer that the library trains on the text as it is, as JSON."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=700, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return str(tok.to_str())


@pytest.mark.parametrize(
    "long",
    [
        "",
        "日本語の文章。" * 2000,  # no white space, and every word short
        "QUJDREVG+/0=" * 2000,
        "x" * 9_990,
        " " * 4_900,
    ],
)
def test_words_up_to_a_length_train_the_same_vocabulary(long: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"{TEXT}it's 'x' don't\n\n   {long}\u00a0{long[::-1]}\n\n {TEXT}"
    expected = trained_whole(text)
    assert train_tokenizer("bpe:700", [text]).to_str() == expected
    monkeypatch.setattr(tokenizers, "LONG_RUN", tokenizers.re.compile(""))  # every chunk is searched for long words
    assert train_tokenizer("bpe:700", [text]).to_str() == expected


@pytest.mark.parametrize("unit", ["ab日", "1", "!?", " ", "\n", "\x1c!"])
def test_a_word_is_cut_into_bounded_pieces_for_training(unit: str) -> None:
    text = f"a {unit * 30_000} b"
    pieces = list(tokenizers._bounded(text))
    assert "".join(pieces) == text
    words = [word for piece in pieces for word, _ in BPE.pre_tokenizer.pre_tokenize_str(piece)]
    ends = [offsets for piece in pieces for _, offsets in BPE.pre_tokenizer.pre_tokenize_str(piece)]
    assert len(words) > 3
    assert max(end - start for start, end in ends) <= tokenizers.LONGEST_WORD


def test_training_on_a_text_without_white_space_ends_soon() -> None:
    rng = random.Random(0)
    text = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=200_000))  # a minute as one word
    start = time.perf_counter()
    train_tokenizer("bpe:400", [text])
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["model"]["vocab"].update(a=10**9),
        lambda content: content["model"]["vocab"].update(a=280),
        lambda content: content["model"]["vocab"].update(a=-1),
        lambda content: content["model"]["vocab"].update(a="1"),
        lambda content: content["model"]["vocab"].update(a=1.5),
        lambda content: content["added_tokens"][0].update(id=10**9),
        lambda content: content.update(added_tokens=[3]),
        lambda content: content.update(added_tokens=3),
    ],
)
def test_ids_without_a_row_in_the_embedding_are_refused(change: Callable[[Any], Any], tmp_path: Path) -> None:
    content = json.loads(BPE.to_str())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert load_tokenizer(path, 280).get_vocab_size() == 280
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(EaseError, match=re.escape(str(path))) as caught:
        load_tokenizer(path, 280)
    assert "use the tokenizer.json" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------
# Tokenizers from elsewhere


def foreign() -> Any:
    """A word tokenizer that puts <s> before a text and </s> after it, and has a chat token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<s>", "</s>", "<|im_start|>", "<unk>", "a", "b"]
    tok = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()  # cuts <|im_start|> into three unknown words
    tok.add_special_tokens(words[:3])
    special = [("<s>", 0), ("</s>", 1)]
    tok.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    return tok


def test_a_foreign_tokenizer_reads_special_tokens_in_a_text_unless_told_otherwise(tmp_path: Path) -> None:
    file, text = tmp_path / "tokenizer.json", "a <|im_start|>"
    foreign().save(str(file))
    for stated, ids in ((None, [4, 2]), (False, [4, 2]), (True, [4, 3, 3, 3])):
        tok = load_tokenizer(file, split_special_tokens=stated)
        assert tok.encode(text, add_special_tokens=False).ids == ids
    (tmp_path / "tokenizer_config.json").write_text('{"split_special_tokens": true}')
    assert load_tokenizer(file).encode(text, add_special_tokens=False).ids == [4, 3, 3, 3]
    assert load_tokenizer(file, split_special_tokens=False).encode(text, add_special_tokens=False).ids == [4, 2]


def test_a_tokenizer_of_ease_in_a_checkpoint_is_read_as_a_checkpoint(tmp_path: Path) -> None:
    BPE.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").encode("<eos>").ids != [1]
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert load_tokenizer(tmp_path / "tokenizer.json").encode("<eos>").ids == [1]


def test_truncation_and_padding_of_a_file_are_not_applied(tmp_path: Path) -> None:
    tok = foreign()
    tok.enable_truncation(3)
    tok.enable_padding(length=8)
    tok.save(str(tmp_path / "tokenizer.json"))
    tok = load_tokenizer(tmp_path / "tokenizer.json")
    assert tok.encode("a b a b").ids == [0, 4, 5, 4, 5, 1]
    assert tokenizers.encode(tok, ["a b a b", "a"], None).tolist() == [0, 4, 5, 4, 5, 1, 0, 4, 1]


def test_a_document_has_the_tokens_that_the_tokenizer_adds_to_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "CHUNK_CHARS", 1)
    tok, texts = foreign(), ["a\nb\na", "b"]
    assert tokenizers.encode(tok, texts, None).tolist() == [0, 4, 5, 4, 1, 0, 5, 1]
    assert tokenizers.encode(tok, texts, 1).tolist() == [0, 4, 5, 4, 1, 0, 5, 1], "not a second </s>"
    assert tokenizers.encode(tok, texts, 2).tolist() == [0, 4, 5, 4, 1, 2, 0, 5, 1, 2]
    assert tokenizers.encode(tok, texts, 2, add_special_tokens=False).tolist() == [4, 5, 4, 2, 5, 2]
    tok.post_processor = None
    assert tokenizers.encode(tok, texts, None).tolist() == [4, 5, 4, 5]


def test_how_special_tokens_are_read_decides_the_hash_and_the_cached_tokens(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("a <|im_start|> b\n" * 200)
    tok = foreign()
    read = load_corpus(source, tok, eos=1, cache_dir=cache)
    assert (read.train == 2).any()
    assert read.train[0] == 0
    bare = load_corpus(source, tok, eos=1, add_special_tokens=False, cache_dir=cache)
    assert bare.train[0] == 4
    again = load_corpus(source, tok, eos=1, cache_dir=cache)
    assert again.train.equal(read.train)
    assert again.tokenizer.encode("<|im_start|>").ids == [0, 2, 1], "the corpus reads a prompt as it read its text"
    tok.encode_special_tokens = True
    split = load_corpus(source, tok, eos=1, cache_dir=cache)
    assert not (split.train == 2).any()
    assert len({read.hash, bare.hash, split.hash}) == 3
