"""Single files: JSON read with every kind of damage reported, text that replaces a file in one step, and checksums.

Files come from other people and from interrupted copies. What a reader returns has been checked so far that no later
step fails on its form: it is an object, no key occurs twice, and it is not nested so deep that a recursive function
overflows.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ease.errors import EaseError, first_line

CHECKSUMS = "SHA256SUMS"

DEEPEST = 100  # levels of nesting; files of ease have fewer than 10, and Python's recursion ends at 1000


def read_json(path: Path, fix: str = "restore it") -> dict[str, Any]:
    """Reads the object in a JSON file.

    Args:
        path: the file.
        fix: what the message of an error recommends.

    Raises:
        EaseError: the file is missing or unreadable, is not JSON in UTF-8, holds something else than an object, repeats
            a key, or is nested deeper than 100 levels.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise EaseError(f"{path} is missing: {fix}") from error
    except (OSError, ValueError) as error:
        raise EaseError(f"{path} is damaged ({first_line(error)}): {fix}") from error
    return parse_json(text, path, fix)


def parse_json(text: str, path: Path, fix: str) -> dict[str, Any]:
    """Parses the JSON object that was read from `path`, with the checks and errors of `read_json`."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise EaseError(f"{path} is damaged (it is nested too deep): {fix}") from error
    except ValueError as error:
        raise EaseError(f"{path} is damaged ({first_line(error)}): {fix}") from error
    if not isinstance(value, dict):
        raise EaseError(f"{path} is damaged (it must hold a JSON object): {fix}")
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [part for parts in level for part in _parts(parts) if isinstance(part, dict | list)]
    if level:
        raise EaseError(f"{path} is damaged (it is nested too deep): {fix}")
    return value


def _parts(value: dict[str, Any] | list[Any]) -> Any:
    return value.values() if isinstance(value, dict) else value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON in UTF-8, with NaN as null, completely or not at all."""
    write_text(path, json.dumps(json_safe(value), indent=1, ensure_ascii=False) + "\n")


def json_safe(value: Any) -> Any:
    """The value with tuples as lists and NaN as None, since JSON has no NaN; infinities stay."""
    if isinstance(value, dict):
        return {key: json_safe(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Writes a text file in UTF-8, completely or not at all; a file of that name stays until the new one is complete.

    Args:
        path: the file. The target of a symbolic link is replaced, not the link. A device or a pipe is written directly.
        text: its content.
        errors: how characters are written that UTF-8 cannot encode, as for `str.encode`.

    Raises:
        OSError: the file cannot be written.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8", errors=errors)
        return
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8", errors=errors)
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def read_checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file that SHA256SUMS lists, as `sha256sum` writes it; empty if there is no such file."""
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise EaseError(f"cannot read {folder / CHECKSUMS} ({error.strerror}): make it readable") from error
    return {name: value for value, _, name in (line.partition("  ") for line in lines)}


def write_checksums(folder: Path, names: Sequence[str], without: Sequence[str] = ()) -> None:
    """Writes the SHA-256 of the files `names` of a folder into its SHA256SUMS; entries of others stay but `without`."""
    sums = {name: value for name, value in read_checksums(folder).items() if name not in without}
    sums |= {name: checksum(folder / name) for name in names}
    write_text(folder / CHECKSUMS, "".join(f"{value}  {name}\n" for name, value in sorted(sums.items())))


def check_checksums(folder: Path, names: Sequence[str], fix: str) -> None:
    """Raises `EaseError` if one of the files `names` has another checksum than SHA256SUMS lists for it.

    Files that are missing or not listed are not checked.
    """
    sums = read_checksums(folder)
    for name in names:
        file = folder / name
        if name in sums and file.is_file() and checksum(file) != sums[name]:
            raise EaseError(
                f"{file} is damaged (its checksum is not the one in {CHECKSUMS}, which you may remove if you changed "
                f"the file on purpose): {fix}"
            )


def checksum(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where ease keeps what it can make again: `$EASE_CACHE`, or `~/.cache/ease`."""
    return Path(os.environ.get("EASE_CACHE") or "~/.cache/ease").expanduser()


def set_usual_mode(*files: Path) -> None:
    """Gives files the mode of new files under the umask; the library safetensors makes its files private (0600)."""
    for file in files:
        # The umask can only be read by setting it, which other threads would notice; a new file shows it.
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".mode-") as folder:
            probe = Path(folder) / "file"
            probe.touch()
            mode = probe.stat().st_mode & 0o777
        file.chmod(mode)
