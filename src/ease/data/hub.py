"""Data sets read through Hugging Face `datasets`: hub names, local paths and files, always streamed.

Nothing is downloaded beyond the rows that are read. Every error of the library, the network or a builder becomes one
`EaseError` that names the data set.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ease.errors import EaseError, require

WIKITEXT = {f"wikitext-{size}": ("Salesforce/wikitext", f"wikitext-{size}-raw-v1") for size in ("2", "103")}


def hub_name(source: str) -> tuple[str, str | None] | None:
    """The arguments (name, configuration) of `load_dataset`, or None for a source that does not name a data set.

    "hf:OWNER/NAME/CONFIG" -> ("OWNER/NAME", "CONFIG"); "hf:PATH" of an existing path -> (PATH, None).
    """
    if source in WIKITEXT:
        return WIKITEXT[source]
    if not source.startswith("hf:"):
        return None
    name = source.removeprefix("hf:")
    if not name:
        raise EaseError("hf: lacks the name of a data set: use hf:NAME or hf:NAME/CONFIG")
    owner_and_name, config = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    return (name, None) if Path(name).exists() or not config else (owner_and_name, config)


def open_data_set(name: str, config: str | None = None, **options: Any) -> Any:
    """`datasets.load_dataset` in streaming mode: split -> rows. Call it, and read the rows, inside `hub_errors`."""
    return require("datasets", "hf").load_dataset(name, config, streaming=True, **options)


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turns every exception raised inside into an `EaseError` about the data set `name`."""
    try:
        yield
    except EaseError:
        raise
    except Exception as error:  # the hub's, the network's and the builders' errors share no base class
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise EaseError(
            f"cannot read {name} through Hugging Face datasets ({reason}): check the name and the network, "
            "or use a local folder with train.txt and valid.txt (--data DIR) or --data stdlib"
        ) from error
