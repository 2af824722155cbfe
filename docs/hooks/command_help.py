"""MkDocs hook: put the output of `ease ... --help` into the pages that name the command.

A page holds a line `<!-- ease eval --help -->`. At build time it becomes a code block with what the command prints, so
that the reference cannot differ from the program.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from typing import Any

from mkdocs.exceptions import PluginError

MARKER = re.compile(r"^<!-- (ease(?: [\w-]+)*) -->$", re.M)
WIDTH = 100


@cache
def printed(command: str) -> str:
    """What a command prints on a terminal of fixed width, without colors."""
    program = "import sys; from ease.cli.main import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", program, *command.split()[1:]], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise PluginError(f"`{command}` failed: {done.stderr.strip()[-500:]}")
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines())


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace every marker of a page."""
    return MARKER.sub(lambda found: f"```text\n$ {found[1]}\n{printed(found[1])}\n```", markdown)
