"""What gains on a split on which phase 1 overfits at once: WikiText-2 at the seed's sizes, held out.

    python -m experiments.wikitext --data ../shared/data/wikitext-2            # runs what is missing, resumes
    python -m experiments.wikitext --data ../shared/data/wikitext-2 --report   # scores test once, prints the table

Word level, 15,936 words, 330,000 training tokens, dim 64, 2 -> 4 layers. Phase 1 memorises its training tokens, so the
states of its training tokens are not those of held-out ones, and what phase 2 learns from them does not carry over.
The variants try to take that difference away: phase 1 stopped earlier, phase 2 on text that phase 1 has not seen,
more dropout, other shares of hard tokens. At inference 30% of the validation tokens go on: 65% of full compute by the
seed's formula.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from experiments.lines import Continued, DeepSupervision, Growth, Lab, Line, Plain, Plan, main
from experiments.utils import load_wikitext_words

TRAIN_TOKENS, VAL_TOKENS = 330_000, 66_000
SEEN = 0.75  # of the training text, where phase 1 leaves some for phase 2


def lab(data: Path) -> Lab:
    words, vocab = load_wikitext_words(data)
    return Lab(
        {"train": words["train"][:TRAIN_TOKENS], "val": words["val"][:VAL_TOKENS], "test": words["test"]},
        len(vocab),
        brick=2,
        depth=4,
        budget=1.4e13,  # six epochs of two layers
        shares=(0.3,),
        lrs=(1e-2,),
        dim=64,
        seq=32,
        batch=32,
        dropout=0.15,
    )


LINES: dict[str, Line] = {
    "phase 1": Plain(2, share=0.6),
    "continued": Continued("phase 1"),
    "growth, half": Growth(4, "phase 1"),
    "growth, all tokens": Growth(4, "phase 1", ratio=1.0),
    "plain, 2 layers": Plain(2),
    "plain, 4 layers": Plain(4),
    "deep supervision": DeepSupervision(4),
    "growth, all tokens, dropout 0.4": Growth(4, "phase 1", ratio=1.0, dropout=0.4),
    "phase 1, half as long": Plain(2, share=0.3),
    "growth after half of phase 1, all tokens": Growth(4, "phase 1, half as long", ratio=1.0),
    "phase 1 on three quarters": Plain(2, share=0.6, part=(0.0, SEEN)),
    "growth on the unseen quarter, all tokens": Growth(4, "phase 1 on three quarters", ratio=1.0, part=(SEEN, 1.0)),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.txt, valid.txt and test.txt")
    main(parser, lambda args: Plan(partial(lab, args.data), LINES, args.out / "wikitext"))
