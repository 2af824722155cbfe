"""Draft sources of exact decoding, one a file."""

from ease.generation.sources.base import LONGEST_DRAFT, Drafts, NoDrafts, Pace, Source
from ease.generation.sources.brick import BrickSource
from ease.generation.sources.exit import ExitSource
from ease.generation.sources.mixed import MixedSource
from ease.generation.sources.text import TextSource

__all__ = [
    "LONGEST_DRAFT",
    "BrickSource",
    "Drafts",
    "ExitSource",
    "MixedSource",
    "NoDrafts",
    "Pace",
    "Source",
    "TextSource",
]
