"""Entry point of the `ease` command."""

import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ease import interrupts
from ease.errors import EaseError
from ease.launcher import launched, num_launched
from ease.version import __version__

# Every command is a module with USAGE, HELP and main(args). None imports torch before it runs, so help is quick, and
# all are imported inside `main`, where an interrupt ends with one line.
COMMANDS = ("run", "watch", "tune", "generate", "serve", "eval", "calibrate", "report", "export", "reproduce")

CLOSED_PIPE = 128 + 13  # exit status of a program that SIGPIPE ended


def usage() -> str:
    """The text of `ease --help`, at most 80 columns wide."""
    lines = ["usage: ease COMMAND ...", ""]
    for name in COMMANDS:
        command = _command(name)
        lines += [f"  ease {name} {command.USAGE}", f"      {command.HELP}"]
    return "\n".join(
        [
            *lines,
            "",
            "`ease run` lists the recipes; `ease COMMAND --help` shows every option.",
            "A run that was killed or interrupted resumes with the same command.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program's name (those of the process by default).

    Returns:
        The exit status: 0; 2 after one sentence on stderr for bad input; 130 after an interrupt; 141 if the reader of
        the output closed its pipe.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    main_thread = threading.current_thread() is threading.main_thread()
    before = interrupts.install() if main_thread else {}  # SIGTERM saves as Ctrl-C does
    try:
        try:
            return _run(args)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            sys.stdout.flush()  # a closed pipe raises here and not at the end of the process
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # what is still in the buffer has no reader
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE


def _command(name: str) -> Any:
    return importlib.import_module(f"ease.cli.{name}")


def _run(args: list[str]) -> int:
    try:
        if not args or args[0] in ("-h", "--help", "help"):
            print(usage())
        elif args[0] == "--version":
            print(f"ease {__version__}")
        elif args[0] in COMMANDS:
            if num_launched() > 1 and args[0] not in ("run", "tune"):
                raise EaseError(f"`ease {args[0]}` runs in one process: only `ease run` and `ease tune` take several")
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: _tell(f"note: {message}")
                _command(args[0]).main(args[1:])
        else:
            raise EaseError(f"unknown command {args[0]!r}: use {', '.join(COMMANDS)} (ease --help)")
    except EaseError as error:
        if num_launched() == 1 or _is_first_error():
            print(f"ease: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"ease: cannot use {error.filename} ({error.strerror}): check the path and the disk", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:  # its message names what was saved
        _tell(f"interrupted; {stop if stop.args else 'nothing was written'}")
        return interrupts.STATUS
    return 0


def _tell(text: str) -> None:
    """Prints a line to stderr, in the first of several processes."""
    if not launched():
        print(f"ease: {text}", file=sys.stderr)


def _is_first_error() -> bool:
    from ease.training.distributed import first_to_report

    return first_to_report()
