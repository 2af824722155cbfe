"""Groups of tokens by rarity, entropy, position and place in a word."""

from __future__ import annotations

import torch

from experiments.harness.lab import Lab
from experiments.harness.token_groups import kinds


def test_tokens_are_grouped_by_what_they_are() -> None:
    text = "ab ab ab cab " * 20
    ids = torch.tensor([ord(c) - 97 if c != " " else 3 for c in text])
    lab = Lab({"train": ids, "val": ids, "test": ids}, "", 4, 1, 2, 1.0, (1.0,), 8, 8, 2, pieces=("a", "b", "c", " "))
    found = kinds(lab)
    names, part = found["place in a word"]
    shown = [names[i] for i in part[:11].tolist()]  # of what follows the first letter
    word = ["inside a word", "no word", "start of a word"]
    assert shown == [*word * 3, "inside a word", "inside a word"]
    names, group = found["entropy after the token before, bits"]
    assert set(group.tolist()) == {0}, "at most two letters follow any other"
    rarity = {names[i] for names, group in [found["rarity of the token, bits"]] for i in group.tolist()}
    assert rarity == {"below 2", "2 to 4"}
