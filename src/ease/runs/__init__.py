"""A run: configuration, execution, and the folder that holds its results."""

from ease.runs.config import DataConfig, RunConfig, ShapeConfig
from ease.runs.reopen import load_start, open_run
from ease.runs.runner import run
from ease.runs.store import load_model, save_model

__all__ = ["DataConfig", "RunConfig", "ShapeConfig", "load_model", "load_start", "open_run", "run", "save_model"]
