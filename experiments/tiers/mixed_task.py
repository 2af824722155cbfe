"""A task with a known share of deep tokens: half of the scored tokens are text, the others answer lookups.

A lookup row shows a random permutation f of a few symbols, one token for each pair (i, f(i)) in random order, and then
queries, each a marker and a symbol x. The target at the symbol is f(x) behind the first marker, which one layer of
attention finds, and f applied `hops` times behind the second, which takes one layer after the other: a layer looks up
what the layer before it found. Conditional depth should therefore cost 1 + h (hops - 1) layers for a share h of deep
queries, against `hops` layers for every token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import ease
from ease.data.batches import Example
from ease.inputs import IGNORE
from experiments.harness.line import BASE, Line, baselines, grow, make
from experiments.harness.task_labs import Examples

GROUPS = ("text", "one-layer", "deep")
"""Groups of scored tokens."""
TASK_METRICS = tuple(f"{what} {group}" for group in GROUPS for what in ("loss", "continue"))
"""Of every group: the loss in nats, and the share of its tokens that run all layers."""
SYMBOLS = 8
"""Of a permutation: more than one layer can combine in its feed-forward is enough, and fewer are learnt sooner."""
ROWS = {"train": 24_000, "val": 640, "test": 2560}
"""Rows with lookups in each split."""
DEPTHS = (1, 2, 3, 4, 6)
DEEP = 2
"""Layers of the models with an early exit."""


@dataclass(frozen=True)
class Mixed(Examples):
    """Rows of text and rows of lookups."""

    hops: int = 2
    """Lookups that a deep query takes."""
    deep_share: float = 0.3
    """Share of the queries that are deep."""
    first: int = 0
    """The first id above those of the text: the pairs, the symbols and the two markers follow."""

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all rows."""
        sha = hashlib.sha256()
        for split, examples in sorted(self.text.items()):
            sha.update(split.encode() + torch.stack([torch.stack(example) for example in examples]).numpy().tobytes())
        return sha.hexdigest()

    def groups(self, examples: list[Example]) -> Tensor:
        """The group of every scored token, as an index into `GROUPS`."""
        ids, targets = (torch.stack(part) for part in zip(*examples, strict=True))
        deep = self.first + SYMBOLS**2 + SYMBOLS + 1
        before = torch.cat([ids[:, :1], ids[:, :-1]], 1)
        group = torch.where(ids < self.first, 0, torch.where(before == deep, 2, 1))
        return group[targets != IGNORE]

    def extra_metrics(
        self, model: ease.StandardTransformer, policy: ease.Policy, scores: ease.Scores
    ) -> dict[str, float]:
        """`TASK_METRICS`."""
        group, found = self.groups(self.test.examples), {}
        for number, name in enumerate(GROUPS):
            inside = group == number
            found[f"loss {name}"] = scores.losses[inside].double().mean().item()
            found[f"continue {name}"] = (scores.exits[inside] == model.num_layers).double().mean().item()
        return found


def lab(data: str, allow_overlap: bool, shape: Mapping[str, Any]) -> Mixed:
    """The lab on the bytes of a text that `ease.load_corpus` reads."""
    corpus = ease.load_corpus(data, "byte", allow_overlap=allow_overlap)
    own = {"first": corpus.vocab_size, **shape}
    empty = Mixed({}, "", corpus.vocab_size + SYMBOLS**2 + SYMBOLS + 2, **own)
    text = {}
    for number, (split, rows) in enumerate(ROWS.items()):
        queries = lookups(rows, empty, torch.Generator().manual_seed(number))
        scored = int((queries[0].targets != IGNORE).sum())
        needed = rows * scored // empty.seq  # rows of text with as many scored tokens
        ids = getattr(corpus, split).int()
        starts = torch.arange(needed) * ((len(ids) - 1) // needed)
        written = [Example(ids[at : at + empty.seq], ids[at + 1 : at + empty.seq + 1]) for at in starts.tolist()]
        mixed = written + queries
        order = torch.randperm(len(mixed), generator=torch.Generator().manual_seed(number)).tolist()
        text[split] = [mixed[i] for i in order]
    about = f"{corpus.name} and lookups over {SYMBOLS} symbols, {empty.deep_share:.0%} of the queries {empty.hops} hops"
    return Mixed(text, about, empty.vocab_size, **own)


def lookups(rows: int, lab: Mixed, generator: torch.Generator) -> list[Example]:
    """Rows of the lab's length with a permutation and queries about it."""
    n, queries = SYMBOLS, (lab.seq - SYMBOLS) // 2
    permutation, order = (torch.rand(rows, n, generator=generator).argsort(1) for _ in range(2))
    pairs = order * n + permutation.gather(1, order)
    deep = torch.rand(rows, queries, generator=generator) < lab.deep_share
    asked = torch.randint(n, (rows, queries), generator=generator)
    found = permutation.gather(1, asked)
    far = found
    for _ in range(lab.hops - 1):
        far = permutation.gather(1, far)
    answer, symbols = torch.where(deep, far, found), lab.first + n * n
    query = torch.stack([symbols + n + deep.long(), symbols + asked], 2).flatten(1)
    target = torch.stack([torch.full_like(answer, IGNORE), symbols + answer], 2).flatten(1)
    ids = torch.cat([lab.first + pairs, query], 1).int()
    targets = torch.cat([torch.full_like(pairs, IGNORE), target], 1).int()
    return [Example(*row) for row in zip(ids, targets, strict=True)]


def lines(depths: tuple[int, ...] = DEPTHS, deep: int = DEEP) -> dict[str, Line]:
    """Standard models of every depth against conditional depth and joint exits."""
    joint = {"num_layers": deep, "exit_layer": 1, "routing_threshold": 0.0}
    return {
        **baselines(depths),
        "gated": Line(make(ease.GatedConfig, deep_layers=deep, exit_layer=1, keep=0.3)),
        "ASHEM": Line(grow(deep, hard_example_ratio=0.3), on=BASE),
        "early exit": Line(make(ease.EarlyExitConfig, **joint)),
        f"progressive growth 1-{deep}": Line(make(ease.GrowthConfig, layers=(1, deep))),
        "gated, half continue": Line(make(ease.GatedConfig, deep_layers=deep, exit_layer=1, keep=0.5)),
        "ASHEM, half hard": Line(grow(deep), on=BASE),
    }
