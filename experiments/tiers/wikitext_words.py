"""WikiText-2 in whole words at the sizes of the original recipe, and variants of ASHEM against overfitting.

15,936 words, 330,000 training tokens, dim 64, 2 -> 4 layers. Phase 1 memorises its training tokens, so their states
differ from those of held-out tokens, and what phase 2 learns from them may not generalise. The variants reduce that
difference: phase 1 stopped earlier, phase 2 on text that phase 1 has not seen, more dropout, every token instead of the
hard half.
"""

from __future__ import annotations

from pathlib import Path

import ease
from experiments.harness.lab import Lab
from experiments.harness.line import BASE, PART, Line, grow, make
from experiments.utils import load_wikitext_words

TRAIN_TOKENS, VAL_TOKENS = 330_000, 66_000
SEEN = 0.75  # of the training text for phase 1, in the variant whose phase 2 has its own text

shallow, all_tokens = make(ease.StandardConfig, num_layers=2), grow(4, hard_example_ratio=1.0)
VARIANTS = {
    "ASHEM, all tokens": Line(all_tokens, on=BASE),
    "phase 1 on three quarters": Line(shallow, share=PART, part=(0.0, SEEN)),
    "ASHEM on the unseen quarter": Line(grow(4), on="phase 1 on three quarters", part=(SEEN, 1.0)),
    "ASHEM, dropout 0.4": Line(grow(4), on=BASE, shape={"dropout": 0.4}),
    "phase 1, half as long": Line(shallow, share=PART / 2),
    "ASHEM after half of phase 1": Line(grow(4), on="phase 1, half as long"),
}


def lab(data: str | None, *, allow_overlap: bool = False, **settings: object) -> Lab:
    """The text, vocabulary and sizes of the original recipe, unless `settings` replace them."""
    words, vocab = load_wikitext_words(data, allow_overlap=allow_overlap)
    text = {"train": words["train"][:TRAIN_TOKENS], "val": words["val"][:VAL_TOKENS], "test": words["test"]}
    sizes = {
        "brick": 2,
        "depth": 4,
        "dim": 64,
        "seq": 32,
        "batch": 32,
        "dropout": 0.15,
        "budget": 1.4e13,  # six epochs of two layers
    }
    name = "wikitext-2" if data is None else Path(data).name
    return Lab(text, f"{name}, whole words", len(vocab), pieces=tuple(vocab), space=" ", **{**sizes, **settings})  # type: ignore[arg-type]
