"""Interrupts of a command end in one line, also while modules are imported and while a tokenizer is trained."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ease.interrupts import interruptible

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends signals as POSIX does")

SLOW_IMPORT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it by default
import ease.__main__
import sends_a_signal
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_modules_are_imported_is_one_line(number: signal.Signals, tmp_path: Path) -> None:
    lines = ("import os", "try:", f"    os.kill(os.getpid(), {int(number)})", "    sum(range(10**6))")
    (tmp_path / "sends_a_signal.py").write_text("\n".join([*lines, "except BaseException:", "    raise ImportError"]))
    command = [sys.executable, "-c", SLOW_IMPORT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 130
    assert done.stderr == "ease: interrupted while modules were loaded; run the same command again\n"


def test_the_handler_is_installed_before_slow_imports() -> None:
    loaded = (
        "import sys, ease.interrupts; print(*{'concurrent.futures', 'inspect', 'logging', 'torch'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "\n"


def test_a_long_call_into_a_library_is_interrupted() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    start = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            interruptible(lambda: time.sleep(5))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.perf_counter() - start < 4
    assert interruptible(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)
