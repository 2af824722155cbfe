"""What gains on a split on which phase 1 overfits at once: WikiText-2 at the seed's sizes, held out.

    python -m experiments.wikitext --data path/to/wikitext-2    # trains what is missing, then writes the tables

Word level, 15,936 words, 330,000 training tokens, dim 64, 2 -> 4 layers. Phase 1 memorises its training tokens, so the
states of its training tokens are not those of held-out ones, and what phase 2 learns from them does not carry over.
The variants try to take that difference away: phase 1 stopped earlier, phase 2 on text that phase 1 has not seen,
more dropout, other shares of hard tokens.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import ease
from experiments.fronts import Report
from experiments.lines import Lab, Line, grow, make
from experiments.running import Experiment, main
from experiments.utils import load_wikitext_words

TRAIN_TOKENS, VAL_TOKENS = 330_000, 66_000
SEEN = 0.75  # of the training text, where phase 1 leaves some for phase 2
BASE = "phase 1"


def lab(data: str | None, **settings: object) -> Lab:
    """The seed's text, its words and sizes; `settings` take their place."""
    words, vocab = load_wikitext_words(data)
    text = {"train": words["train"][:TRAIN_TOKENS], "val": words["val"][:VAL_TOKENS], "test": words["test"]}
    sizes = {
        "brick": 2,
        "depth": 4,
        "dim": 64,
        "seq": 32,
        "batch": 32,
        "dropout": 0.15,
        "budget": 1.4e13,
        "lrs": (1e-2,),  # six epochs of two layers
    }
    name = "wikitext-2" if data is None else Path(data).name
    return Lab(text, f"{name}, whole words", len(vocab), pieces=tuple(vocab), **{**sizes, **settings})  # type: ignore[arg-type]


def experiment(data: str) -> Experiment:
    plain = {f"plain, {k} layers": Line(make(ease.StandardConfig, num_layers=k)) for k in (2, 4)}
    shallow, every = make(ease.StandardConfig, num_layers=2), grow(4, hard_example_ratio=1.0)
    lines = {
        BASE: Line(shallow, share=0.6),
        "continued": Line(shallow, on=BASE),
        "growth, half": Line(grow(4), on=BASE),
        "growth, all tokens": Line(every, on=BASE),
        **plain,
        "deep supervision": Line(make(ease.EarlyExitConfig, num_layers=4, exit_layer=2, routing_threshold=0.0)),
        "growth, all tokens, dropout 0.4": Line(every, on=BASE, shape={"dropout": 0.4}),
        "phase 1, half as long": Line(shallow, share=0.3),
        "growth after half of phase 1, all tokens": Line(every, on="phase 1, half as long"),
        "phase 1 on three quarters": Line(shallow, share=0.6, part=(0.0, SEEN)),
        "growth on the unseen quarter, all tokens": Line(every, on="phase 1 on three quarters", part=(SEEN, 1.0)),
    }
    command = f"python -m experiments.wikitext --data {Path(data).name}"
    report = Report("WikiText-2 at the seed's sizes", BASE, tuple(plain), ("continued",), command=command)
    return Experiment("wikitext", partial(lab, data), lines, report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with train.txt, valid.txt and test.txt")
    main(parser, lambda args: experiment(args.data))
