"""Recipes: runnable configurations, by name or by path."""

import importlib.util
from pathlib import Path
from typing import Any

from ease.errors import EaseError


def recipes() -> dict[str, Path]:
    """The recipes that come with ease: beside the package once installed, at the root of a checkout."""
    package = Path(__file__).resolve().parents[1]
    folder = next((f for f in (package / "recipes", package.parents[1] / "recipes") if f.is_dir()), None)
    paths = sorted(folder.glob("*.py")) if folder else []
    return {path.stem.replace("_", "-"): path for path in paths if not path.stem.startswith("_")}


def load_recipe(name: str) -> Any:
    """The module of a recipe, by its name or its path: it has a docstring and a function `config()`."""
    path = recipes().get(name, Path(name))
    if path.suffix != ".py" or not path.is_file():
        raise EaseError(f"no recipe {name!r}: use {', '.join(recipes())}, or the path of a recipe file")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "config", None)):
        raise EaseError(f"{path} is no recipe: it needs a function config() that returns an ease.runs.RunConfig")
    return module
