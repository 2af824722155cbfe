"""Entry point of the `ease` command."""

import signal
import sys
import threading
import warnings
from collections.abc import Sequence

from ease.cli import calibrate, eval, export, generate, report, reproduce, run, tune
from ease.errors import EaseError

# Every command is a module with USAGE, HELP and main(args). None imports torch before it runs, so help is quick.
COMMANDS = {
    "run": run,
    "tune": tune,
    "generate": generate,
    "eval": eval,
    "calibrate": calibrate,
    "report": report,
    "export": export,
    "reproduce": reproduce,
}


def usage() -> str:
    """The text of `ease --help`, at most 80 columns wide."""
    lines = ["usage: ease COMMAND ...", ""]
    for name, command in COMMANDS.items():
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
    """Runs a command and returns its exit code: 2 and one sentence on stderr for bad input, 130 if interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    if threading.current_thread() is threading.main_thread():  # SIGTERM, too, saves before it ends the process
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if not args or args[0] in ("-h", "--help", "help"):
            print(usage())
        elif args[0] == "--version":
            import ease

            print(f"ease {ease.__version__}")
        elif args[0] in COMMANDS:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: print(f"ease: note: {message}", file=sys.stderr)
                COMMANDS[args[0]].main(args[1:])
        else:
            raise EaseError(f"unknown command {args[0]!r}: use {', '.join(COMMANDS)} (ease --help)")
    except EaseError as error:
        print(f"ease: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"ease: cannot use {error.filename} ({error.strerror}): check the path and the disk", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:  # its message says what was saved
        print(f"ease: interrupted; {stop if stop.args else 'nothing was written'}", file=sys.stderr)
        return 130
    return 0
