"""Ctrl-C and SIGTERM in a command: a handler that is safe while modules are imported, and calls that it can stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

SIGNALS = (signal.SIGINT, signal.SIGTERM)

STATUS = 130  # exit status of a command that an interrupt ended

Result = TypeVar("Result")


def handle(signum: int, frame: FrameType | None) -> None:
    """Raises `KeyboardInterrupt`, or ends the process with one line while a module is imported.

    An exception that is raised while a library is imported may be replaced or suppressed by the library.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"ease: interrupted while modules were loaded; run the same command again\n")
            os._exit(STATUS)
        frame = frame.f_back
    raise KeyboardInterrupt


def install() -> dict[signal.Signals, Any]:
    """Sets the handler where signals have Python's or the system's own, and returns the handlers from before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler in (signal.default_int_handler, signal.SIG_DFL):  # a job in the background ignores Ctrl-C
            signal.signal(number, handle)
    return before


def interruptible(call: Callable[[], Result]) -> Result:
    """The result of a call into a library that runs no Python code for long, and so handles no signal.

    The call runs in a thread, and an interrupt does not wait for its end.
    """
    import threading  # here, since importing both takes longer than all that precedes `install` in a command
    from concurrent.futures import Future

    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # raised by `result`
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result()
