"""The error that ease raises for bad input, and the checks that several modules share.

A message is one sentence that names the problem and the fix, since the command line prints it alone.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

LARGEST_INTEGER = 2**63 - 1  # the largest integer that a tensor holds


class EaseError(ValueError):
    """Bad input: a value, file or option that ease cannot work with.

    It is a `ValueError`, so callers of the library can catch it without importing it. The command line prints its
    message to stderr and exits with status 2.

    Args:
        message: one sentence. Line breaks and control characters, which names in a damaged file may hold, are escaped:
            the message stays one line, and a terminal does not interpret it.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type; errors of libraries have several lines or none."""
    return next((line for line in str(error).strip().splitlines() if line), type(error).__name__)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises EaseError unless `value` is one of `choices`."""
    if value not in choices:
        raise EaseError(f"{name} must be {' or '.join(choices)}, got {value!r}")


def check_integer(name: str, value: object, least: int = 0, most: int = LARGEST_INTEGER) -> None:
    """Raises EaseError unless `value` is an integer in `least`..`most`; a boolean is not an integer."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise EaseError(f"{name} must be an integer, got {reprlib.repr(value)}")
    if int(value) < least:
        raise EaseError(f"{name} must be at least {least}, got {value}")
    if int(value) > most:
        raise EaseError(f"{name} must be at most {most}, got {reprlib.repr(int(value))}")


def check_number(name: str, value: object, least: float = -math.inf, *, finite: bool = True) -> None:
    """Raises EaseError unless `value` is a number of at least `least`.

    Args:
        name: what the message calls the value.
        value: the value to check; a boolean is not a number.
        least: the smallest number allowed, which also refuses NaN; without it, the caller checks the range.
        finite: whether infinity is refused.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise EaseError(f"{name} must be a number, got {reprlib.repr(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if finite and math.isinf(number):
        raise EaseError(f"{name} must be finite, got {reprlib.repr(value)}")
    if least > -math.inf and not number >= least:  # NaN is not
        raise EaseError(f"{name} must be at least {least}, got {value}")


def check_boolean(name: str, value: object) -> None:
    """Raises EaseError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise EaseError(f"{name} must be true or false, got {reprlib.repr(value)}")


def check_string(name: str, value: object) -> None:
    """Raises EaseError unless `value` is a string."""
    if not isinstance(value, str):
        raise EaseError(f"{name} must be a string, got {reprlib.repr(value)}")


def check_list(name: str, value: object) -> tuple[Any, ...]:
    """Returns the elements of `value`; raises EaseError if it has none, or is a string."""
    try:
        if isinstance(value, Iterable) and not isinstance(value, str | bytes | dict):
            return tuple(value)
    except TypeError:  # an array without dimensions
        pass
    raise EaseError(f"{name} must be a list, got {reprlib.repr(value)}")


def check_layers(name: str, value: object, last: int = LARGEST_INTEGER) -> tuple[int, ...]:
    """Returns the layers that `value` lists; raises EaseError unless they are integers up to `last`."""
    layers = check_list(name, value)
    for layer in layers:
        check_integer(f"a layer in {name}", layer, -LARGEST_INTEGER, last)
    return tuple(map(int, layers))


def check_counts(least: int, **values: object) -> None:
    """Raises EaseError for a value that is no integer of at least `least`. None passes: it means a default."""
    for name, value in values.items():
        if value is not None:
            check_integer(name, value, least)


def check_fields(config: Any) -> None:
    """Raises EaseError unless every field of a dataclass has the type that its annotation states."""
    kind: Any = type(config)
    types = _annotations(kind)
    for field in fields(config):
        if field.init:
            _check_type(field.name, getattr(config, field.name), types[field.name])


Function = TypeVar("Function", bound=Callable[..., Any])


def checked(function: Function) -> Function:
    """Decorates a function: it raises EaseError for an argument of another type than its annotation states.

    Arguments annotated as tensors, devices or protocols are left to the function, which accepts other values too.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        kinds = _annotations(function)
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            kind = signature.parameters[name].kind
            if name in kinds and kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                _check_type(name, value, kinds[name])
        return function(*args, **kwargs)

    return cast(Function, call)


def check_names(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises EaseError for names in `given`, keywords of `owner`, that are not known."""
    if unknown := sorted({*given} - {*known}):
        raise EaseError(f"{owner} has no {', '.join(unknown)}: it has {', '.join(known)}")


@functools.cache
def _annotations(annotated: Any) -> dict[str, Any]:
    return get_type_hints(annotated)


def _check_type(name: str, value: object, kind: Any) -> None:
    """Numbers, strings, choices and classes, alternatives of them, and lists and dictionaries that hold them."""
    parts = get_args(kind)
    form = get_origin(kind) or kind
    if form in (Union, UnionType):
        _check_alternatives(name, value, [part for part in parts if part is not NoneType], NoneType in parts)
    elif form is Literal:
        check_choice(name, value, parts)
    elif form is bool:
        check_boolean(name, value)
    elif form is int:
        check_integer(name, value, -LARGEST_INTEGER)
    elif form is float:
        check_number(name, value, finite=False)
    elif form is str:
        check_string(name, value)
    elif form in (tuple, Sequence):
        for element in check_list(name, value):
            _check_type(f"an element of {name}", element, parts[0])
    elif form is Mapping:
        if not isinstance(value, Mapping):
            raise EaseError(f"{name} must be a dictionary, got {reprlib.repr(value)}")
        for key, element in value.items():
            _check_type(f"a key of {name}", key, parts[0])
            _check_type(f"an element of {name}", element, parts[1])
    elif _is_checked(form) and not isinstance(value, form):
        what = "callable" if form is Callable else f"{'an' if form.__name__[0] in 'AEIOU' else 'a'} {form.__name__}"
        fix = f": pass its {name}" if isinstance(getattr(value, name, None), form) else ""  # such as a wrapped model
        raise EaseError(f"{name} must be {what}, got {type(value).__name__}{fix}")


def _check_alternatives(name: str, value: object, kinds: Sequence[Any], optional: bool) -> None:
    """Raises the error of the first alternative, or that of the first list if one is given."""
    if optional and value is None:
        return
    if isinstance(value, Iterable) and not isinstance(value, str):
        kinds = sorted(kinds, key=lambda kind: not isinstance(get_origin(kind), type))
    errors = []
    for kind in kinds:
        try:
            _check_type(name, value, kind)
        except EaseError as error:
            errors.append(error)
    if len(errors) == len(kinds):
        raise errors[0]


def _is_checked(form: Any) -> bool:
    """Whether the values of an annotation are instances of it.

    Not so for protocols, and for torch's own tensors, devices and dtypes, which are read from lists and names, too.
    """
    return (
        isinstance(form, type)
        and form is not Any
        and form.__module__ != "torch"
        and not getattr(form, "_is_protocol", False)
    )


def check_seed(seed: object) -> None:
    """Raises EaseError for a seed outside 0..2^63 - 1, a range that all random generators in use accept."""
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise EaseError(f"seed must be an integer, got {reprlib.repr(seed)}")
    if not 0 <= int(seed) < 2**63:
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
