"""A table of counts of the training text alone, on the test text of a scale: a baseline that needs no FLOPs.

python -m experiments.studies.count_table OUT [SCALE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import ease
from experiments.analysis.table import Table, write_tables
from experiments.tiers.scales import make_lab

TABLES = ((2, 2**20), (4, 2**20), (6, 2**20), (8, 2**20), (8, 2**23))
"""The longest context, in tokens, and the largest number of n-grams that are kept."""


def main(out: str, scale: str = "s") -> None:
    lab = make_lab(scale, "stdlib")
    test = [row for x, y, *_ in lab.test for row in np.concatenate((x.numpy(), y.numpy()[:, -1:]), 1)]
    rows = []
    for longest, kept in TABLES:
        orders = range(1, longest + 1)
        table = ease.CountTable.of(lab.text["train"], lab.vocab_size, orders=tuple(orders), max_ngrams=kept)
        accuracy, ppl, _ = table.score(test)
        rows.append([str(longest), f"{len(table.tokens):,}", f"{ppl:.3f}", f"{accuracy:.1%}"])
        print(*rows[-1], flush=True)
    about = (
        f"{lab.corpus}; counted on {lab.tokens['train']:,} training tokens, scored on the {len(test):,} sequences of "
        f"{lab.seq} tokens that scale {scale} scores its models on, each without the text before it. Made by "
        f"`python -m experiments.studies.count_table OUT {scale}`."
    )
    header = ["longest context", "n-grams kept", "test PPL", "accuracy"]
    title = "A table of counts of the training text"
    write_tables([Table("counts", title, header, rows, [about])], Path(out), "count-table")


if __name__ == "__main__":
    main(*sys.argv[1:3])
