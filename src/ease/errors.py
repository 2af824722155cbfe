"""The error that ease raises for bad input, and the checks that several modules share.

A message is one sentence that names the problem and the fix, since the command line prints it alone.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class EaseError(ValueError):
    """Bad input: a value, file or option that ease cannot work with.

    It is a `ValueError`, so callers of the library can catch it without importing it. The command line prints its
    message to stderr and exits with status 2.
    """


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises EaseError unless `value` is one of `choices`."""
    if value not in choices:
        raise EaseError(f"{name} must be {' or '.join(choices)}, got {value!r}")


def check_least(least: float, **values: float | None) -> None:
    """Raises EaseError for a value below `least` or NaN. None passes: where it is allowed, it means a default."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise EaseError(f"{name} must be at least {least}, got {value}")


def check_seed(seed: int) -> None:
    """Raises EaseError for a seed outside 0..2^63 - 1, a range that all random generators in use accept."""
    if not 0 <= seed < 2**63:
        raise EaseError(f"seed must lie in 0..2^63 - 1, got {seed}")


def check_text(name: str, text: str) -> None:
    """Raises EaseError for text with a lone surrogate: UTF-8 cannot encode it, and tokenizers refuse it.

    Python puts lone surrogates into strings for bytes that it could not decode, such as in command-line arguments.
    """
    if found := re.search("[\ud800-\udfff]", text):
        raise EaseError(f"{name} is not valid text at character {found.start() + 1}: give it in UTF-8")


def require(module: str, extra: str) -> Any:
    """Imports an optional dependency.

    Args:
        module: its full name, such as "rouge_score.rouge_scorer".
        extra: the extra of ease that installs it, such as "eval".

    Returns:
        The module.

    Raises:
        EaseError: the package is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise EaseError(
            f"this needs the package {module.split('.')[0]}: pip install -e '.[{extra}]' in a checkout of ease"
        ) from None


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Prints an EaseError raised inside to stderr and exits with status 2, for scripts.

    Example:
        >>> with exit_on_error():
        ...     tyro.cli(main)
    """
    try:
        yield
    except EaseError as error:
        print(f"ease: {error}", file=sys.stderr)
        raise SystemExit(2) from None
