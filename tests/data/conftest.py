"""What the tests of `ease.data` share: a folder of texts, an empty cache, the files of a task and examples."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ease.data.batches import Example

Write = Callable[..., Path]
A, B, C = ({"text": f"text {i}", "label": label} for i, label in enumerate(("no", "yes", "no")))

TEXT = "the cat sat on the mat,\nand then the dog sat on the cat.\n\n    def f(x): return x\n" * 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder of three different texts."""
    here = tmp_path / "books"
    here.mkdir()
    for name, text in (("train", TEXT), ("valid", TEXT[:900].upper()), ("test", TEXT[:600].title())):
        (here / f"{name}.txt").write_text(text, encoding="utf-8")
    return here


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the three files of a task: `write(train=[record or line, ...])`; other splits get default records."""

    def make(**splits: list[Any]) -> Path:
        default: dict[str, list[Any]] = {"train": [A, B], "valid": [C], "test": [{**C, "text": "text 9"}]}
        for name, records in (default | splits).items():
            lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path

    return make


@pytest.fixture
def examples() -> list[Example]:
    """Examples of all lengths from 1 to 40, with a label at the last token."""
    lengths = (torch.randperm(40) + 1).tolist()
    rows = [torch.randint(1, 256, (n,), dtype=torch.int32) for n in lengths]
    return [
        Example(ids, torch.full_like(ids, -100).index_fill(0, torch.tensor([len(ids) - 1]), len(ids) % 3))
        for ids in rows
    ]
