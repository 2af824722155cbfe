"""Recipes: runnable configurations, by name or by path."""

import ast
import importlib.util
from pathlib import Path
from typing import Any

from ease.errors import EaseError


def recipes() -> dict[str, Path]:
    """The recipes of ease by name: in the package once installed, at the root of a checkout otherwise."""
    package = Path(__file__).resolve().parents[1]
    folder = next((f for f in (package / "recipes", package.parents[1] / "recipes") if f.is_dir()), None)
    paths = sorted(folder.glob("*.py")) if folder else []
    return {path.stem.replace("_", "-"): path for path in paths if not path.stem.startswith("_")}


def summary_of(path: Path) -> str:
    """The first line of a recipe's docstring, read without running the recipe (which imports torch)."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def load_recipe(name: str) -> Any:
    """Import a recipe.

    Args:
        name: name of a recipe of ease, or path of a Python file.

    Returns:
        The module, which has a docstring and a function `config()` that returns a `RunConfig`.

    Raises:
        EaseError: there is no such recipe, or the file has no function `config()`.
    """
    path = recipes().get(name, Path(name))
    if path.suffix != ".py" or not path.is_file():
        raise EaseError(f"no recipe {name!r}: use {', '.join(recipes())}, or the path of a recipe file")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "config", None)):
        raise EaseError(f"{path} is not a recipe: it needs a function config() that returns an ease.runs.RunConfig")
    return module
