"""Scales of tiers 1 and 2: sizes of model and data that fit a laptop, and the depths trained at each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ease
from ease.data.tokenizers import token_strings
from experiments.harness import probes
from experiments.harness.lab import Lab
from experiments.harness.line import BASE, Line
from experiments.tiers import deep, mixed_task, wikitext_words


def text_lab(tokenizer: str, data: str, allow_overlap: bool, shape: Mapping[str, Any]) -> Lab:
    """Running text."""
    corpus = ease.load_corpus(data, tokenizer, allow_overlap=allow_overlap)
    text = {"train": corpus.train, "val": corpus.val, "test": corpus.test}
    pieces = token_strings(corpus.tokenizer, range(corpus.vocab_size))
    description = f"{corpus.name}, {corpus.tokenizer_spec}"
    return Lab(text, description, corpus.vocab_size, pieces=tuple(pieces), **shape)


BYTES, BPE = partial(text_lab, "byte"), partial(text_lab, "bpe:512")


def words_lab(data: str, allow_overlap: bool, shape: Mapping[str, Any]) -> Lab:
    """Whole words, as in the original recipe."""
    return wikitext_words.lab(None if data == "wikitext-2" else data, allow_overlap=allow_overlap, **shape)


@dataclass(frozen=True)
class Scale:
    """A size of model and data, and the depths trained at it."""

    settings: Mapping[str, Any]
    """Settings of the lab."""
    lab: Callable[[str, bool, Mapping[str, Any]], Lab] = BYTES
    """Makes the lab of data, from whether splits may overlap and the lab's settings."""
    depths: tuple[int, ...] = (1, 2, 3)
    """Depths of the standard models; the first is phase 1's, after which tokens may exit."""
    curve: Mapping[float, tuple[int, ...]] = field(default_factory=dict)
    """Depths of standard models at other budgets: share of the budget -> depths near the best one."""
    deep: int = 2
    """Layers of the models with an early exit."""
    memory: bool = False
    """Whether the lines with a memory are trained, in place of most strategies without one."""
    more: Mapping[str, Line] = field(default_factory=dict)
    """Lines in addition to every strategy."""
    only: Mapping[str, Line] = field(default_factory=dict)
    """Lines instead of every strategy."""
    base: str = BASE
    """The line whose final model determines the hard tokens."""
    task_metrics: tuple[str, ...] = probes.TASK_METRICS
    """Metrics of the lab that are shown in addition to perplexity."""


def sizes(dim: int, budget: float, lrs: tuple[float, ...], **settings: Any) -> dict[str, Any]:
    """Settings of a lab, with those that most scales share."""
    own = {"dim": dim, "budget": budget, "lrs": lrs, "seq": 128, "batch": 32}
    return own | {"epoch_batches": 200, "eval_batches": (20, 80)} | settings


CURVE_XS = {0.25: (1, 2), 0.5: (1, 2), 2: (1, 2), 4: (1, 2)}
CURVE_S = {0.25: (1, 2), 0.5: (1, 2), 2: (2, 3), 4: (2, 3)}
CURVE_M = {0.25: (2, 3), 0.5: (2, 3), 2: (3, 4), 4: (3, 4)}

SCALES = {
    "tiny": Scale(sizes(16, 2.8e8, (1e-2, 2e-2), seq=32, batch=8, epoch_batches=5, eval_batches=(2, 3))),
    "xs": Scale(sizes(32, 5e11, (1e-2, 2e-2, 4e-2, 8e-2), mine_epochs=2), curve=CURVE_XS),
    "s": Scale(sizes(48, 2e12, (5e-3, 1e-2, 2e-2), mine_epochs=4), curve=CURVE_S),
    "m": Scale(sizes(64, 8e12, (5e-3, 1e-2, 2e-2), mine_epochs=7), depths=(1, 2, 3, 4), curve=CURVE_M, deep=3),
    "xs-memory": Scale(sizes(32, 5e11, (1e-2, 2e-2, 4e-2), mine_epochs=2), curve=CURVE_XS, memory=True),
    "s-memory": Scale(sizes(48, 2e12, (1e-2, 2e-2), mine_epochs=4), curve=CURVE_S, memory=True),
    "m-memory": Scale(
        sizes(64, 8e12, (5e-3, 1e-2, 2e-2), mine_epochs=7), depths=(1, 2, 3, 4), curve=CURVE_M, deep=3, memory=True
    ),
    "l": Scale(
        sizes(128, 2e14, (3e-3, 6e-3), seq=256, batch=16, mine_epochs=20),
        BPE,
        depths=(2, 4, 6),
        deep=6,
    ),
    "deep": Scale(
        sizes(128, 2.2e14, (3e-3, 6e-3), seq=256, batch=16, epoch_batches=400),
        depths=deep.DEPTHS,
        curve=dict.fromkeys((deep.EIGHTH, deep.QUARTER), deep.DEPTHS),
        deep=12,
        only=deep.LINES,
        base=deep.BASE,
    ),
    "mixed": Scale(
        sizes(64, 8e12, (2.5e-3, 5e-3, 1e-2), epoch_batches=None, eval_batches=(None, None)),
        mixed_task.lab,
        depths=mixed_task.DEPTHS,
        only=mixed_task.lines(),
        task_metrics=mixed_task.TASK_METRICS,
    ),
    "words": Scale({"lrs": (1e-2,)}, words_lab, depths=(2, 3, 4), deep=4, more=wikitext_words.VARIANTS),
    "bpe": Scale(sizes(64, 2e12, (1e-2, 2e-2), dropout=0.1, mine_epochs=2, epoch_batches=150), BPE),
}


def make_lab(name: str, data: str, allow_overlap: bool = False) -> Lab:
    """The lab at a scale, on whatever text `ease.load_corpus` reads."""
    scale = SCALES[name]
    shape = {"brick": scale.depths[0], "depth": scale.depths[-1], **scale.settings}
    return scale.lab(data, allow_overlap, shape)


DEFAULT_SCALES = {"smoke": ("tiny",), "1": ("xs", "s", "m"), "2": ("s",)}
"""Tier -> its scales on the standard library."""
OTHER_DATA_SCALES = ("words", "bpe")
"""Scales on other data."""
