"""The report of one run or of several as a single HTML file that opens offline.

- The file contains everything it needs: the metrics of the runs as JSON, one style sheet, one script. Its content
  security policy forbids all requests.
- Strings from a run's files (names, notes, token texts) enter the page only as JSON and are shown as text, so that they
  cannot become markup.
- The verdict is computed here and not in the page, so that terminal and report show the same sentence.
- Missing metrics are shown as a dash.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from ease.errors import EaseError, first_line
from ease.files import check_checksums, read_json, write_text
from ease.report.formats import SPLITS
from ease.report.seeds import seed_groups
from ease.report.tables import decoding_sentence
from ease.report.verdict import verdict

# What sentences and tables raise for values of another type than `ease run` writes.
DAMAGED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)

# Parts of the page's script; each builds on those before.
SCRIPTS = ("ui.js", "charts.js", "sections.js", "decoding.js", "explorer.js", "page.js")


def write_report(runs: list[Path], out: Path) -> Path:
    """Write the report of one run or of several side by side as a single HTML file that opens offline.

    Runs that differ only in their random seed are also summarized as mean and 95% t interval.

    Args:
        runs: run folders, each with a summary.json and perhaps an explorer.json.
        out: the file to write; its folder is created if necessary.

    Returns:
        `out`.

    Raises:
        EaseError: no folder is given, a folder is not a run folder or its files are damaged, or `out` cannot be
            written.
    """
    if not runs:
        raise EaseError("No run folder was given: name at least one folder with a summary.json.")
    loaded = [_load(Path(run)) for run in runs]
    names = [run["summary"].get("name") or run["folder"] for run in loaded]
    for run, name in zip(loaded, names, strict=True):
        # Runs that share a name, such as several seeds of one recipe, are distinguished by their folders.
        run["label"] = name if names.count(name) == 1 else f"{name} ({run['folder']})"
    title = loaded[0]["label"] if len(loaded) == 1 else f"{len(loaded)} runs compared"
    try:
        seeds = seed_groups(loaded)
    except DAMAGED as error:
        raise EaseError(
            f"The summary.json of one of the runs is damaged (settings cannot be read: {first_line(error)}): run it "
            "again."
        ) from error
    assets = files("ease.report") / "assets"
    read = {name: (assets / name).read_text("utf-8") for name in ("page.html", "style.css", *SCRIPTS)}
    # One pass over the placeholders, so that text from a run is never searched for placeholders.
    parts = {
        "TITLE": html.escape(str(title)),
        "STYLE": read["style.css"],
        "DATA": _embedded({"title": str(title), "runs": loaded, "seeds": seeds}),
        "SCRIPT": "\n".join(read[name] for name in SCRIPTS),
    }
    page = re.sub("|".join(f"@@{name}@@" for name in parts), lambda hit: parts[hit[0].strip("@")], read["page.html"])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # UTF-8 cannot encode a lone surrogate in a name.
        write_text(out, page, errors="xmlcharrefreplace")
    except OSError as error:
        raise EaseError(f"The report cannot be written to {out} ({error.strerror}): name another file.") from error
    return out


def _load(folder: Path) -> dict[str, Any]:
    summary = _read(folder / "summary.json")
    if summary is None:
        raise EaseError(f"{folder} is not a run folder: it has no summary.json.")
    if summary.get("format") != 1:
        raise EaseError(
            f"{folder / 'summary.json'} has format {summary.get('format')!r} and this version of ease reads "
            "format 1: use the version that wrote it."
        )
    lines = summary.get("lines")
    valid = isinstance(lines, list) and all(
        isinstance(line, dict)
        and isinstance(line.get("name"), str)
        and all(isinstance(line.get(split), dict | None) for split in SPLITS)
        for line in lines
    )
    if not valid or not lines:
        raise EaseError(f"{folder / 'summary.json'} is damaged (its lines cannot be read): run it again.")
    explorer = _read(folder / "explorer.json")
    try:
        sentences = {"verdict": asdict(verdict(summary)), "decoding": decoding_sentence(summary)}
    except DAMAGED as error:
        raise EaseError(
            f"{folder / 'summary.json'} is damaged (its metrics cannot be read: {first_line(error)}): run it again."
        ) from error
    check_checksums(folder, ("summary.json", "explorer.json"), "run it again.")
    return {"folder": folder.resolve().name, "summary": summary, "explorer": explorer, **sentences}


def _read(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None if there is no file."""
    return read_json(path, "run it again.") if os.path.lexists(path) else None


def _embedded(value: object) -> str:
    """JSON in plain ASCII that an HTML parser cannot mistake for markup."""
    text = json.dumps(_plain(value), separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: Any) -> Any:
    """Floats rounded to six digits, and None for those that are not finite, which JSON cannot express."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
