"""Where does growing on hard tokens stand? Every line at equal training FLOPs on the standard library corpus.

    python -m experiments.front --brick 1             # runs what is missing of the plan, resumes where it stopped
    python -m experiments.front --brick 1 --report    # picks settings on validation, scores test once, prints a table

A small brick that is near its limit (byte-level, dim 48), so that depth has something to give. The lines are plain
models of every depth, deep supervision with the same exit, phase 1 trained on ("continued"), and growth in several
variants.
"""

from __future__ import annotations

import argparse
from functools import partial

import ease
from experiments.lines import Continued, DeepSupervision, Growth, Lab, Line, Plain, Plan, main


def lab(brick: int) -> Lab:
    corpus = ease.load_corpus("stdlib", "byte")
    return Lab(
        {split: getattr(corpus, split) for split in ("train", "val", "test")},
        corpus.vocab_size,
        brick=brick,
        depth=brick + 2,
        budget=2e12,
        shares=(0.5, 0.3),
        lrs=(1e-2, 2e-2),
        dim=48,
        seq=128,
        batch=32,
        epoch_batches=200,
        eval_batches=(20, 80),
    )


def lines(brick: int) -> dict[str, Line]:
    """The plan, in order: what others stand on comes first."""
    above, twice, base = brick + 1, brick + 2, "phase 1"

    def growth(layers: int, ratio: float = 0.5, **options: str) -> Growth:
        # Growth reads what "continued" reads: the next 800 batches of the same order, mined at once.
        return Growth(layers, base, ratio, mine_epochs=4, **options)  # type: ignore[arg-type]

    return {
        base: Plain(brick, share=0.6),
        **{f"plain, layers: {k}": Plain(k) for k in (brick, above, twice)},
        "continued": Continued(base),
        "deep supervision": DeepSupervision(above),
        f"growth {brick} to {above}, half": growth(above),
        f"growth {brick} to {twice}, half": growth(twice),
        f"growth {brick} to {above}, half, copied": growth(above, init="copy"),
        f"growth {brick} to {above}, a third": growth(above, 0.33),
        f"growth {brick} to {above}, all tokens": growth(above, 1.0),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--brick", type=int, default=1, help="layers of phase 1")
    main(parser, lambda args: Plan(partial(lab, args.brick), lines(args.brick), args.out / f"front-{args.brick}"))
