"""`ease` and `python -m ease`."""

import signal
import sys

from ease import interrupts

interrupts.install()  # before the imports of the command line, in which an interrupt would end in a traceback

from ease.cli.main import main as command  # noqa: E402


def main() -> int:
    """Run a command, and ignore interrupts once it has ended."""
    status = command()
    for number in interrupts.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    return status


if __name__ == "__main__":
    sys.exit(main())
