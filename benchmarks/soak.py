"""Long and rough runs: real SIGKILLs at random moments, and many steps with a look at the memory.

    python benchmarks/soak.py kills [--kills 40] [--processes 1] [--seed 0] [--out results/soak] [-- COMMAND ...]
    python benchmarks/soak.py steps [--steps 20000] [--out results/soak]

`kills` starts COMMAND, kills it and all its processes with SIGKILL at a moment drawn uniformly from the time that the
whole run takes after its folder has appeared, and starts it again, until it ends by itself; then the next run begins.
Every second kill waits until a file is being written. Every run must end with the weights, metrics and results of a run
that was not killed, bit by bit, but for times.
COMMAND is called with `--out FOLDER`. By default it is a short run of `demo` on one thread that saves after
every step; `python benchmarks/soak.py run ARGUMENTS` is `ease run ARGUMENTS` with such checkpoints.

With --processes above 1 torchrun starts the default run, with sharded layers, and every kill hits one process at
random, torchrun or one of those that train. Without torchrun these go on: the command is started again when they have
ended.

With --tolerance above 0, numbers and weights may differ by that share, for runs that are not deterministic.

`steps` trains a tiny model for many steps and prints the memory of the process along the way, as metrics.jsonl has it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ease.storage import CHECKPOINTS, is_locked

ROOT = Path(__file__).resolve().parents[1]

TINY = [
    *("--data", str(ROOT / "LICENSE"), "--data.tokenizer", "byte", "--data.seq-len", "16", "--data.batch-size", "8"),
    *("--data.eval-batches", "4", "--model.dim", "16", "--model.num-heads", "2", "--device", "cpu"),
]

DEMO = [
    *(sys.executable, str(Path(__file__).resolve()), "run", "demo", *TINY, "--data.epoch-batches", "8"),
    *("--strategy.phase1-max-flops", "1e8", "--strategy.phase2-max-flops", "2e8", "--compare", "continued"),
]

SHARDED = ("--parallel", "fsdp", "--strategy.phase1-max-flops", "4e7", "--strategy.phase2-max-flops", "8e7")

UNLIKE = {"generation", "memory_bytes", "flops_utilization", "starts", "id"}  # in any two runs


def found(folder: Path) -> dict[str, Any]:
    """What a run folder says, without times: names to rows, values and tensors."""
    from safetensors.torch import load_file

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if "second" not in k and k not in UNLIKE}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    texts = [folder / name for name in ("config.json", "run.json", "summary.json", "explorer.json")]
    read = {file.name: timeless(json.loads(file.read_text(encoding="utf-8"))) for file in texts}
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    weights = {name: value.tolist() for name, value in load_file(folder / "model.safetensors").items()}
    # A kill between the last two steps of a run, renaming its folder and emptying it, leaves its checkpoints there.
    names = sorted(file.name for file in folder.iterdir() if file.name != CHECKPOINTS)
    return {"names": names, "weights": weights, "metrics": timeless(rows), **read}


def differences(a: Any, b: Any, tolerance: float, path: str = "") -> list[str]:
    """The places where two values differ by more than a share."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [place for key in a for place in differences(a[key], b[key], tolerance, f"{path}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [place for i in range(len(a)) for place in differences(a[i], b[i], tolerance, f"{path}[{i}]")]
    if a == b or (
        isinstance(a, float) and isinstance(b, float) and tolerance and math.isclose(a, b, rel_tol=tolerance)
    ):
        return []
    return [f"{path}: {str(a)[:40]} and {str(b)[:40]}"]


def start(command: list[str], out: Path) -> subprocess.Popen[bytes]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "EASE_CACHE": str(out.parent / "cache")}
    with (out.parent / "log.txt").open("ab") as log:
        return subprocess.Popen([*command, "--out", str(out)], stdout=log, stderr=log, env=env)


def kills(command: list[str], count: int, one: bool, seed: int, out: Path, tolerance: float) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    partial = out / ".run.partial"
    process, begun = start(command, out / "run"), time.perf_counter()
    startup = waited(process, partial)
    if process.wait():
        sys.exit(f"the command failed: see {out / 'log.txt'}")
    lasts = time.perf_counter() - begun - startup
    (out / "run").rename(out / "whole")
    whole = found(out / "whole")
    print(f"a run takes {startup:.1f} s to start and {lasts:.1f} s of work", flush=True)
    draw, killed, writing, runs = random.Random(seed), 0, 0, 0
    while killed < count:
        runs, lives = runs + 1, 0
        while True:
            lives += 1
            process = start(command, out / "run")
            waited(process, partial)
            hunting = killed % 2 == 1 and killed < count
            try:
                process.wait(draw.uniform(0, lasts / 4 if hunting else lasts) if killed < count else None)
            except subprocess.TimeoutExpired:
                members = family(process.pid)
                while hunting and process.poll() is None and not writes(partial):
                    pass
                if process.poll() is None:
                    writing += writes(partial)
                    for pid in [draw.choice(members)] if one else members:
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    process.wait()
                    while any(map(is_alive, members)):
                        time.sleep(0.1)
                    killed += 1
                    if partial.exists() or not (out / "run").exists():
                        continue
                    break  # the run was complete, and the process was about to end
            if process.returncode:
                sys.exit(f"run {runs} failed in life {lives}: see {out / 'log.txt'}")
            break
        if places := differences(whole, found(out / "run"), tolerance):
            sys.exit(f"run {runs} differs after {lives} lives, at {len(places)} places: {places[:5]}")
        shutil.rmtree(out / "run")
        print(f"run {runs}: the same after {lives - 1} kills; {killed} kills so far, {writing} in a write", flush=True)
    print(f"{killed} kills in {runs} runs, {writing} of them while a file was written: all runs ended the same")


def writes(partial: Path) -> bool:
    """Whether a file or folder is being written in a partial folder: until it is complete, it has another name."""
    return any(".partial" in name for _, folders, files in os.walk(partial) for name in (*folders, *files))


def family(pid: int) -> list[int]:
    """A process and all that it has started (the workers of torchrun are in sessions of their own)."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [pid, *(member for file in lists for child in file.read_text().split() for member in family(int(child)))]


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except OSError:
        return False


def waited(process: subprocess.Popen[bytes], partial: Path) -> float:
    """Waits until the process holds the lock of the folder; gives the seconds."""
    begun = time.perf_counter()
    while process.poll() is None and not (partial.is_dir() and is_locked(partial)):
        time.sleep(0.1)
    return time.perf_counter() - begun


def steps(count: int, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    every = max(1, count // 40)  # steps of an epoch
    command = [
        *(sys.executable, "-m", "ease", "run", "standard", *TINY, "--data", "stdlib", "--data.max-tokens", "200000"),
        *("--strategy.num-layers", "2", "--strategy.max-epochs", str(count // every), "--strategy.patience", "None"),
        *("--strategy.max-flops", "None", "--data.batch-size", "4", "--data.epoch-batches", str(every)),
        *("--compare", "full-depth", "--log-every", "100"),
    ]
    begun = time.perf_counter()
    if start(command, out / "run").wait():
        sys.exit(f"the command failed: see {out / 'log.txt'}")
    seconds = time.perf_counter() - begun
    rows = [json.loads(row) for row in (out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    memory = {row["step"]: row["memory_bytes"] / 2**20 for row in rows if row["event"] == "step"}
    for step in sorted(memory):
        if step == 1 or step % (count // 10) == 0:
            print(f"step {step:6}: {memory[step]:.1f} MiB")
    early, late = (
        [mib for step, mib in memory.items() if low <= step / count <= high] for low, high in ((0.05, 0.1), (0.95, 1))
    )
    print(f"{max(memory)} steps in {seconds:.0f} s; memory {max(late) - max(early):+.1f} MiB from 10% to the end")


def main() -> None:
    if sys.argv[1:2] == ["run"]:
        from ease.cli.main import main as ease
        from ease.training import checkpoint

        checkpoint.EVERY = 0.0
        sys.exit(ease(sys.argv[1:]))
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "steps"))
    parser.add_argument("--kills", type=int, default=40, help="number of kills, at least")
    parser.add_argument("--processes", type=int, default=1, help="processes that train one run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--tolerance", type=float, default=0.0, help="share by which numbers may differ")
    parser.add_argument("--steps", type=int, default=20_000, help="optimizer steps")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "soak", help="folder, emptied first")
    given = parser.parse_args(sys.argv[1:at])
    if given.what == "kills":
        several = given.processes > 1
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(given.processes))
        default = [DEMO[0], *torchrun, *DEMO[1:], *SHARDED] if several else DEMO
        command = sys.argv[at + 1 :] or default
        kills(command, given.kills, several, given.seed, given.out / "kills", given.tolerance)
    else:
        steps(given.steps, given.out / "steps")


if __name__ == "__main__":
    main()
