"""Consoles of the command line."""

import os
import sys
from typing import NoReturn

from rich.console import Console

PIPE_WIDTH = 120  # a file or a pipe has no width of its own, and tables should not be squeezed into a guess


class CommandConsole(Console):
    """A console that raises `BrokenPipeError` when its reader has gone, so that the command ends quietly."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def output_console() -> Console:
    """A console on stdout, as wide as the terminal or as COLUMNS says."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return CommandConsole(highlight=False, width=None if known else PIPE_WIDTH)


def error_console() -> Console:
    """A console on stderr, for progress and notes."""
    return CommandConsole(stderr=True, highlight=False)
