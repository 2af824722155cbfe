"""A training under torchrun whose process is killed: the agent starts all again, and the run goes on to its end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_processes import ROOT
from data_runs import TINY
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")]

TOLERANCE = 2e-4  # of losses, in another number of processes


def command(out: Path, *before: str) -> list[str]:
    """A short run that saves after every step."""
    text, soak = str(ROOT / "LICENSE"), str(ROOT / "benchmarks" / "soak.py")
    limits = ("--strategy.phase1-max-flops", "4e7", "--strategy.phase2-max-flops", "3e8", "--compare", "continued")
    return [sys.executable, *before, soak, "run", "demo", "--data", text, "--out", str(out), *TINY, *limits]


def workers(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in lists for child in file.read_text().split()]


def test_a_killed_process_is_started_again_and_the_run_goes_on(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    checkpoints = tmp_path / ".run.partial" / "checkpoints"
    several = [*command(tmp_path / "run", *torchrun), "--parallel", "fsdp"]
    with subprocess.Popen(several, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        try:
            while not list(checkpoints.glob("*/phase-2.previous.safetensors")):
                assert running.poll() is None, running.communicate()[0][-2000:]
                time.sleep(0.05)
            before = workers(running.pid)
            os.kill(before[-1], signal.SIGKILL)
            told = running.communicate(timeout=500)[0]
        finally:
            running.kill()
    assert running.returncode == 0, told[-2000:]
    assert told.count("resuming the unfinished run") == 1
    assert len(json.loads((tmp_path / "run" / "run.json").read_text())["starts"]) == 2
    subprocess.run(command(tmp_path / "one"), env=env, check=True, capture_output=True)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "run"))
    assert one.keys() == two.keys()
    curves = [json.loads((tmp_path / name / "summary.json").read_text())["lines"] for name in ("one", "run")]
    for alone, together in zip(*curves, strict=True):
        losses = [[row["val_loss"] for row in line["curve"]] for line in (alone, together)]
        assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE)
