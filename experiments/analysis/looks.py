"""Colour and mark of every line, the same in all figures, and the order in which tables list lines."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

from experiments.harness.line import CONTINUED


class Look(NamedTuple):
    """Colour and mark of a line, the same in every figure."""

    colour: str
    mark: str


# Okabe and Ito's colours, which colour-blind readers can distinguish, for the strategies that share most figures; a
# strategy's variants are shades of its colour, and marks distinguish lines in print without colour.
LOOKS = {
    CONTINUED: Look("#666666", "d"),
    "ASHEM": Look("#D55E00", "*"),
    "N-stage": Look("#8C3B00", "h"),
    "open growth": Look("#E69F00", "v"),
    "open growth from the start": Look("#A87400", "v"),
    "progressive growth, 2 depths": Look("#0072B2", "o"),
    "progressive growth, 3 depths": Look("#56B4E9", "s"),
    "progressive growth, 4 depths": Look("#003F66", "8"),
    "stacking": Look("#009E73", "^"),
    "stacking, with exit": Look("#7CCBB5", "^"),
    "gated": Look("#CC79A7", "D"),
    "gated, grown": Look("#7A2E5D", "P"),
    "gated from the start": Look("#E3B5D0", "D"),
    "gated, an exit per layer": Look("#A3487C", "X"),
    "early exit": Look("#8A8A00", "<"),
    "early exit, distilled": Look("#BDBD52", "<"),
    "tuned exit": Look("#6A51A3", ">"),
    "tuned exit, distilled": Look("#B3A2D6", ">"),
    "LayerSkip": Look("#A6761D", "p"),
    "deep supervision": Look("#B2182B", "H"),
    "deep supervision, weighted by depth": Look("#E58A8A", "H"),
    "discriminative": Look("#1B5E20", "X"),
    # With a memory, in figures of lines that have one.
    "ASHEM on brick 0": Look("#F0A070", "*"),
    "early exit, exit 0 too": Look("#BDBD52", ">"),
    "standard, 0 layers": Look("#000000", "1"),
    "standard, 1 layer": Look("#333333", "2"),
    "standard, 2 layers": Look("#666666", "3"),
    "standard, 3 layers": Look("#999999", "4"),
    # Variants of ASHEM, which share no figure with other strategies.
    "mined from one epoch": Look("#0072B2", "o"),
    "selected by loss": Look("#009E73", "s"),
    "selected by gain from depth, one epoch": Look("#7CCBB5", "s"),
    "selected at random": Look("#1B5E20", "s"),
    "hard ratio 0.1": Look("#E3B5D0", "D"),
    "hard ratio 0.3": Look("#CC79A7", "D"),
    "hard ratio 0.7": Look("#A3487C", "D"),
    "hard ratio 1": Look("#7A2E5D", "D"),
    "copied initialization": Look("#56B4E9", "^"),
    "random initialization": Look("#003F66", "v"),
    "tokens without context": Look("#B2182B", "X"),
    "nothing frozen": Look("#8A8A00", "<"),
    "nothing frozen, loss at the exit kept": Look("#A87400", "v"),
    "ASHEM, untied head": Look("#F0A070", "*"),
    "ASHEM, untied head trained": Look("#8C3B00", "P"),
}
"""Line -> its look, in the order in which the tables of the paper list lines."""
UNLISTED_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
ALWAYS = ("ASHEM", CONTINUED)
"""Lines that are always in colour."""
BEST = 6
"""The number of other lines in colour."""


def strategy(line: str) -> str:
    """The entry of `LOOKS` for a line, which ignores its memory, depths and the confidence measure of its exits."""
    name = line.removeprefix("memory, ").removesuffix(", classifier exit")
    return f"progressive growth, {name.count('-') + 1} depths" if name.startswith("progressive growth") else name


def look(line: str) -> Look:
    """A line's look. An unlisted line gets a colour derived from its name, so that it is the same in every figure."""
    name = strategy(line)
    return LOOKS.get(name) or Look(UNLISTED_COLOURS[zlib.crc32(name.encode()) % len(UNLISTED_COLOURS)], "o")


def order(line: str) -> tuple[int, str]:
    """Sort key of a line: its place in `LOOKS`, then its name."""
    names = list(LOOKS)
    name = strategy(line)
    return (names.index(name) if name in names else len(names), line)


def coloured(names: Sequence[str]) -> list[str]:
    """The lines in colour, of lines sorted from best to worst: the best few, and those in `ALWAYS`."""
    best = [name for name in names if name not in ALWAYS][:BEST]
    return [name for name in names if name in best or name in ALWAYS]
