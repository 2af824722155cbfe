"""Rooms of the experiments: imports run one way, those for annotations included."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import experiments

ROOT = Path(experiments.__file__).parent
LEVELS = {
    "utils": 0,
    "harness": 1,
    "strategies": 2,
    "analysis": 2,
    "tiers": 3,
    "studies": 4,
    "reproduce": 5,
    "paper": 5,
}


def imported(file: Path) -> set[str]:
    """The modules of `experiments` that a file imports anywhere, as dotted names below the package."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "experiments":
            package = node.module.removeprefix("experiments").strip(".")  # type: ignore[union-attr]
            for alias in node.names:
                inside = ROOT.joinpath(*filter(None, package.split(".")), f"{alias.name}.py").exists()
                found.add(".".join(filter(None, (package, alias.name if inside else ""))))
    return found


def test_rooms_import_only_lower_rooms_and_modules_have_no_cycle() -> None:
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in ROOT.rglob("*.py")}
    graph = {name: imported(file) for name, file in files.items() if not name.endswith("__init__")}
    assert len(graph) > 25
    for name, others in graph.items():
        for other in others:
            room, its = (each.split(".")[0] for each in (name, other))
            assert room == its or LEVELS[its] < LEVELS[room], f"{name} imports {other}"
    TopologicalSorter(graph).prepare()  # raises CycleError
