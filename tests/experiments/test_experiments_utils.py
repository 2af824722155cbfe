"""The experiments' WikiText loaders, on a tiny text of the same form."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from ease.data.batches import TokenBatches
from ease.errors import EaseError
from experiments.utils import create_wikitext_dataloaders, get_device, load_wikitext_words, set_seed


@pytest.fixture
def wikitext(tmp_path: Path) -> Path:
    """1,000 training, 300 validation and 100 test words; a few of the latter two nowhere else."""
    for name, count, own in (("train", 1000, "Train"), ("valid", 300, "Valid"), ("test", 100, "Test")):
        words = [own, "<unk>", *(f"W{i % 50}" for i in range(count - 2))]
        (tmp_path / f"{name}.txt").write_text(" \n = " + " ".join(words[:-1]) + " \n")  # "=" is a word, too
    return tmp_path


def test_words_of_all_splits_share_one_lower_cased_vocabulary(wikitext: Path) -> None:
    words, vocab = load_wikitext_words(wikitext)
    assert {split: len(ids) for split, ids in words.items()} == {"train": 1000, "val": 300, "test": 100}
    assert set(vocab) == {"<pad>", "<unk>", "=", "train", "valid", "test", *(f"w{i}" for i in range(50))}
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert (vocab["<pad>"], vocab["<unk>"]) == (0, 1)
    assert words["test"][:4].tolist() == [vocab[word] for word in ("=", "test", "<unk>", "w0")]


def test_loaders_take_a_fifth_for_validation_and_full_batches_only(wikitext: Path) -> None:
    train, val, vocab_size = create_wikitext_dataloaders(100, 4, seq_len=8, data_dir=wikitext)
    words, vocab = load_wikitext_words(wikitext)
    assert vocab_size == len(vocab)
    assert len(train) == (900 - 1) // 8 // 4
    assert len(val) == (180 - 1) // 8 // 4
    assert all(x.shape == y.shape == (4, 8) for loader in (train, val) for x, y in loader)

    scored = torch.cat([y.flatten() for _, y in val])
    assert torch.equal(scored, words["val"][1 : len(scored) + 1])
    assert len(TokenBatches(words["test"], 8, 4)) == 3


def test_training_order_follows_the_seed(wikitext: Path) -> None:
    def first(seed: int) -> torch.Tensor:
        return next(iter(create_wikitext_dataloaders(100, 4, seq_len=8, seed=seed, data_dir=wikitext)[0]))[0]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_bad_input_names_the_fix(wikitext: Path) -> None:
    for samples in (0, 1000):
        with pytest.raises(EaseError, match="1 to 111"):
            create_wikitext_dataloaders(samples, 4, seq_len=8, data_dir=wikitext)
    with pytest.raises(EaseError, match="seq_len"):
        create_wikitext_dataloaders(100, 4, seq_len=-1, data_dir=wikitext)
    with pytest.raises(EaseError, match="batch"):
        create_wikitext_dataloaders(100, 64, seq_len=8, data_dir=wikitext)
    with pytest.raises(EaseError, match="stdlib"):
        load_wikitext_words(wikitext / "nowhere")


def test_set_seed_sets_every_generator() -> None:
    def draw() -> tuple[float, float, float]:
        set_seed(3)
        legacy = float(np.random.rand())  # noqa: NPY002
        return random.random(), legacy, float(torch.rand(()))

    assert draw() == draw()


def test_the_device_is_one_that_torch_has() -> None:
    assert torch.ones(2, device=get_device()).sum().item() == 2
