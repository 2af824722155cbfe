"""Random damage to files: truncated, with flipped bits, or with another value in their JSON."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

DAMAGES = int(os.environ.get("EASE_DAMAGES", "600"))  # of each kind of file in the slow tests

VALUES = [
    None,
    True,
    0,
    -1,
    1.5,
    10**9,
    10**12,
    10**30,
    1e308,
    math.inf,
    math.nan,
    "",
    "x",
    "\n",
    [],
    [1.5],
    {},
    {"a": 1},
]


def damage_json(content: Any, rng: random.Random) -> Any:
    """Replaces or deletes one value somewhere in the content."""
    places: list[tuple[Any, Any]] = []
    level = [content]
    while level:
        part = level.pop()
        if isinstance(part, dict | list):
            keys = list(part) if isinstance(part, dict) else list(range(min(3, len(part))))
            keys = rng.sample(keys, min(30, len(keys)))
            places += [(part, key) for key in keys]
            level += [part[key] for key in keys]
    part, key = rng.choice(places)
    if rng.random() < 0.2:
        del part[key]
    else:
        part[key] = rng.choice(VALUES)
    return content


def damage(file: Path, rng: random.Random) -> str:
    """Damages a file in one of three ways, and returns what was done."""
    data = bytearray(file.read_bytes())
    kinds = ["truncated", "flipped", *(["value"] * 3 if file.suffix == ".json" else [])]
    kind = rng.choice(kinds)
    if kind == "truncated":
        file.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "flipped":
        # Half of the flips hit the beginning, where headers are.
        for _ in range(rng.choice((1, 1, 8))):
            place = rng.randrange(min(len(data), rng.choice((64, 2000, len(data)))))
            data[place] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    else:
        file.write_text(json.dumps(damage_json(json.loads(data), rng)))
    return kind
