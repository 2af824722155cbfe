"""The one error that ease raises for bad input, and the checks that several modules share."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class EaseError(ValueError):
    """Bad input, told in one sentence that names the fix.

    It is a `ValueError`, so library users need not know it; the command line prints its message alone
    and exits with code 2.
    """


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuses a value that is none of the choices."""
    if value not in choices:
        raise EaseError(f"{name} must be {' or '.join(choices)}, got {value!r}")


def check_least(least: float, **values: float | None) -> None:
    """Refuses numbers below `least`, and those that are none; None, where it is allowed, means a default."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise EaseError(f"{name} must be at least {least}, got {value}")


def check_seed(seed: int) -> None:
    """Refuses a seed that some generator does not take."""
    if not 0 <= seed < 2**63:
        raise EaseError(f"seed must lie in 0..2^63 - 1, got {seed}")


def check_text(what: str, text: str) -> None:
    """Refuses text that no UTF-8 stands for: half a pair of surrogates, which is how Python holds other bytes."""
    if found := re.search("[\ud800-\udfff]", text):
        raise EaseError(f"{what} is no valid text at character {found.start() + 1}: give it in UTF-8")


def needs(module: str, extra: str) -> Any:
    """The module, or the sentence that names the extra of ease with which it is installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise EaseError(
            f"this needs the package {module.split('.')[0]}: pip install -e '.[{extra}]' in a checkout of ease"
        ) from None


@contextmanager
def told() -> Iterator[None]:
    """Bad input inside ends the program: its sentence on stderr and exit code 2."""
    try:
        yield
    except EaseError as error:
        print(f"ease: {error}", file=sys.stderr)
        raise SystemExit(2) from None
