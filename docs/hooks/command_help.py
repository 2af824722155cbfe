"""MkDocs hook: put the output of `ease ... --help` into the pages that name the command.

A page holds a line `<!-- ease eval --help -->`. At build time it becomes a code block with what the command prints, so
that the reference cannot differ from the program.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

from mkdocs.exceptions import PluginError

MARKER = re.compile(r"^<!-- (ease(?: [\w-]+)*) -->$", re.M)
WIDTH = 100

# All commands of a page run in one process, because each import of torch takes seconds.
PROGRAM = """
import contextlib, io, json, sys
from ease.cli.main import main

def printed(command):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            code = main(command.split()[1:])
        except SystemExit as end:
            code = end.code
    if code:
        sys.exit(f"`{command}` ended with exit code {code}")
    return out.getvalue()

print(json.dumps({command: printed(command) for command in sys.argv[1:]}))
"""


def printed(commands: list[str]) -> dict[str, str]:
    """What each command prints at a fixed width, without colors."""
    environment = os.environ | {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *commands], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise PluginError(f"the help of a command could not be printed: {done.stderr.strip()[-500:]}")
    texts: dict[str, str] = json.loads(done.stdout)
    return {name: "\n".join(map(str.rstrip, text.strip("\n").splitlines())) for name, text in texts.items()}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace every marker of a page."""
    if not (commands := MARKER.findall(markdown)):
        return markdown
    texts = printed(commands)
    return MARKER.sub(lambda found: f"```text\n$ {found[1]}\n{texts[found[1]]}\n```", markdown)
