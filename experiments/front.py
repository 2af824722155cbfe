"""Where does growing on hard tokens stand? Every line at equal training FLOPs on the standard library corpus.

    python -m experiments.front --brick 1    # trains what is missing, then writes results/front-1/front.md

A small brick that is near its limit (byte-level, dim 48), so that depth has something to give. The lines are plain
models of every depth, an exit trained jointly, phase 1 trained on ("continued"), and growth in several variants.
"""

from __future__ import annotations

import argparse
from functools import partial

import ease
from experiments.fronts import Report
from experiments.lines import Lab, Line, grow, make
from experiments.running import Experiment, main

BASE = "phase 1"


def lab(brick: int) -> Lab:
    corpus = ease.load_corpus("stdlib", "byte")
    return Lab(
        {split: getattr(corpus, split) for split in ("train", "val", "test")},
        f"{corpus.name}, byte",
        corpus.vocab_size,
        brick=brick,
        depth=brick + 2,
        budget=2e12,
        lrs=(1e-2, 2e-2),
        dim=48,
        seq=128,
        batch=32,
        epoch_batches=200,
        eval_batches=(20, 80),
        mine_epochs=4,
    )


def experiment(brick: int) -> Experiment:
    above, twice = brick + 1, brick + 2
    plain = {f"plain, layers: {k}": Line(make(ease.StandardConfig, num_layers=k)) for k in (brick, above, twice)}
    joint = make(ease.EarlyExitConfig, num_layers=above, exit_layer=brick, routing_threshold=0.0)
    lines = {
        BASE: Line(make(ease.StandardConfig, num_layers=brick), share=0.6),
        **plain,
        "continued": Line(make(ease.StandardConfig, num_layers=brick), on=BASE),
        "deep supervision": Line(joint),
        f"growth {brick} to {above}, half": Line(grow(above), on=BASE),
        f"growth {brick} to {twice}, half": Line(grow(twice), on=BASE),
        f"growth {brick} to {above}, half, copied": Line(grow(above, grow_init="copy"), on=BASE),
        f"growth {brick} to {above}, a third": Line(grow(above, hard_example_ratio=0.33), on=BASE),
        f"growth {brick} to {above}, all tokens": Line(grow(above, hard_example_ratio=1.0), on=BASE),
    }
    title, command = "Growth on hard tokens", f"python -m experiments.front --brick {brick}"
    report = Report(title, BASE, tuple(plain), ("continued",), command=command)
    return Experiment(f"front-{brick}", partial(lab, brick), lines, report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--brick", type=int, default=1, help="layers of phase 1")
    main(parser, lambda args: experiment(args.brick))
