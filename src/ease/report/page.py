"""The report of a run: one HTML file that opens offline, and the same table for a terminal.

Notable in it:

- The file holds all it needs: the runs' figures as JSON, one style sheet, one script. Its content security
  policy forbids every request.
- What a run's files say (names, notes, token texts) enters the page as JSON only and is shown as text, so
  nothing in it can become markup.
- The verdict is worded here, not in the page: the terminal and the report say the same sentence.
- Figures that are absent show as a dash; a report never fills a gap.
"""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ease.errors import EaseError
from ease.report.formats import SPLITS
from ease.report.tables import decoding
from ease.report.verdict import (
    verdict,
)

if TYPE_CHECKING:
    pass

# The page's script, in the order its parts build on each other.
SCRIPTS = ("ui.js", "charts.js", "sections.js", "decoding.js", "explorer.js", "page.js")


# ---------------------------------------------------------------------------------------------------------
# The page


def write_report(runs: list[Path], out: Path) -> Path:
    """Write the report of one run, or of several side by side, as one HTML file that opens offline.

    Args:
        runs: run folders; each holds a `summary.json` and may hold an `explorer.json`.
        out: the file to write; its folder is made where it is missing.

    Returns:
        `out`.

    Raises:
        EaseError: no folders given, a folder is no run folder or its files are damaged, or `out`
            cannot be written.
    """
    if not runs:
        raise EaseError("No run folder was given: name at least one folder that holds a summary.json.")
    loaded = [_load(Path(run)) for run in runs]
    names = [run["summary"].get("name") or run["folder"] for run in loaded]
    for run, name in zip(loaded, names, strict=True):
        # Runs that share a name (seeds of one recipe, say) are told apart by their folders.
        run["label"] = name if names.count(name) == 1 else f"{name} ({run['folder']})"
    title = loaded[0]["label"] if len(loaded) == 1 else f"{len(loaded)} runs compared"
    assets = files("ease.report") / "assets"
    read = {name: (assets / name).read_text("utf-8") for name in ("page.html", "style.css", *SCRIPTS)}
    # One pass over the placeholders, so that text a run brought in is never searched for one.
    parts = {
        "TITLE": html.escape(str(title)),
        "STYLE": read["style.css"],
        "DATA": _embedded({"title": str(title), "runs": loaded}),
        "SCRIPT": "\n".join(read[name] for name in SCRIPTS),
    }
    page = re.sub("|".join(f"@@{name}@@" for name in parts), lambda hit: parts[hit[0].strip("@")], read["page.html"])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate in a name is the one thing UTF-8 cannot hold.
        out.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    except OSError as error:
        raise EaseError(f"The report cannot be written to {out} ({error.strerror}): name another file.") from error
    return out


def _load(folder: Path) -> dict[str, Any]:
    summary = _read(folder / "summary.json")
    if summary is None:
        raise EaseError(f"{folder} is not a run folder: it holds no summary.json.")
    if summary.get("format") != 1:
        raise EaseError(
            f"{folder / 'summary.json'} has format {summary.get('format')!r} and this version of ease reads "
            "format 1: use the version that wrote it."
        )
    lines = summary.get("lines")
    sound = isinstance(lines, list) and all(
        isinstance(line, dict)
        and isinstance(line.get("name"), str)
        and all(isinstance(line.get(split), dict | None) for split in SPLITS)
        for line in lines
    )
    if not sound or not lines:
        raise EaseError(f"{folder / 'summary.json'} is damaged (its lines cannot be read): run it again.")
    explorer = _read(folder / "explorer.json")
    told = {"verdict": asdict(verdict(summary)), "decoding": decoding(summary)}
    return {"folder": folder.resolve().name, "summary": summary, "explorer": explorer, **told}


def _read(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise EaseError(f"{path} is damaged or cannot be read: run it again.") from error
    if not isinstance(value, dict):
        raise EaseError(f"{path} is damaged (it holds no JSON object): run it again.")
    return value


def _embedded(value: object) -> str:
    """JSON that no HTML parser can mistake for markup, in plain ASCII."""
    text = json.dumps(_plain(value), separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: Any) -> Any:
    """Figures to six digits, and None for those that are not finite, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
