"""Groups of tokens: by rarity, by predictability from the token before, by position, and by place in a word.

A token is hard if the confidence of phase 1's final model is low. Groups are made from the counts of the training text
and the token itself, not from any model, so that they show which kinds of token are hard and which gain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ease
from ease.evaluation.scoring import perplexity
from experiments.harness.lab import Lab

BITS = (2.0, 4.0, 6.0, 8.0, 10.0)
"""Edges between groups of rarity and of entropy, in bits."""

Kinds = dict[str, tuple[list[str], Tensor]]
"""Kind of grouping -> the names of its groups, and the group of each token."""


def groups(kinds: Kinds, before: ease.Scores, after: ease.Scores, hard: Tensor) -> list[dict[str, Any]]:
    """For each group of test tokens: its share, its share of hard tokens, and perplexity before and after."""
    found = []
    for kind, (names, group) in kinds.items():
        for number, name in enumerate(names):
            inside = group == number
            if bool(inside.any()):
                found.append(
                    {
                        "kind": kind,
                        "group": name,
                        "share": inside.double().mean().item(),
                        "hard": hard[inside].double().mean().item(),
                        "before": perplexity(before.losses[inside]),
                        "after": perplexity(after.losses[inside]),
                    }
                )
    return found


def kinds(lab: Lab) -> Kinds:
    """The groups of the tokens that the lab's test batches score, in order."""
    n = len(lab.test) * lab.batch * lab.seq
    context, target = lab.text["test"][:n].long(), lab.text["test"][1 : n + 1].long()
    train, V = lab.text["train"].long(), lab.vocab_size
    counts = torch.bincount(train, minlength=V).double() + 1
    rarity = -(counts / counts.sum()).log2()[target]
    position = torch.arange(len(target)) % lab.seq
    positions = [lab.seq // 16, lab.seq // 4]
    found = {
        "rarity of the token, bits": (ranges(BITS), bins(rarity, BITS)),
        "entropy after the token before, bits": (ranges(BITS), bins(next_token_entropy(train, V)[context], BITS)),
        "position in the sequence": (ranges(positions), bins(position.double(), positions)),
    }
    if lab.pieces:
        word = torch.tensor([piece[:1].isalnum() or piece[:1] == "_" for piece in lab.pieces])
        open_ = torch.tensor([piece[-1:].isalnum() or piece[-1:] == "_" for piece in lab.pieces])
        part = torch.where(word[target], 1 + (open_[context]).long(), 0)
        found["place in a word"] = (["no word", "start of a word", "inside a word"], part)
    return found


def next_token_entropy(train: Tensor, vocab_size: int) -> Tensor:
    """(V,) entropy in bits of the token that follows, over the training text; 0 for tokens that never occur there."""
    pairs, counts = (train[:-1] * vocab_size + train[1:]).unique(return_counts=True)
    first, counts = pairs // vocab_size, counts.double()
    total = torch.zeros(vocab_size, dtype=torch.double).index_add(0, first, counts)
    surprise = counts * (total[first] / counts).log2()
    return torch.zeros(vocab_size, dtype=torch.double).index_add(0, first, surprise) / total.clamp(min=1)


def bins(values: Tensor, edges: Any) -> Tensor:
    return torch.bucketize(values, torch.tensor(edges, dtype=values.dtype), right=True)


def ranges(edges: Any) -> list[str]:
    """The names of the groups between the edges."""
    middle = [f"{low:g} to {high:g}" for low, high in zip(edges, edges[1:])]
    return [f"below {edges[0]:g}", *middle, f"{edges[-1]:g} and more"]
