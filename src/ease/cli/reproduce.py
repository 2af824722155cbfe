"""`ease reproduce`: the tables and figures of the paper."""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

from ease.errors import EaseError

USAGE = "TIER [--data D] [--model CHECKPOINT]"
HELP = "reproduce the paper's tables and figures (needs a checkout)"


def main(args: list[str]) -> None:
    import tyro

    @dataclass(frozen=True)
    class Arguments:
        """Train what is missing of a tier of the paper's experiments, and write its tables and figures.

        Tiers: smoke (everything, at a size that says nothing), 1 (every strategy against plain models at equal training
        FLOPs), 2 (ASHEM taken apart), 3 (tier 1's tables on what is given with --data and --model). What is trained is
        kept under OUT/TIER: the same command goes on where it was stopped. Tables say which lines are missing.
        """

        tier: tyro.conf.Positional[str]
        """smoke, 1, 2 or 3."""
        data: str | None = None
        """stdlib (by default), a folder with train.txt and valid.txt, a text file, wikitext-2, wikitext-103 or
        hf:NAME/CONFIG. For tier 3 a folder with train.jsonl, of texts with labels or of prompts with completions;
        .jsonl or .parquet files or hf:NAME/CONFIG, read as a stream of documents; or, with --model, any text."""
        model: str | None = None
        """For tier 3: a Llama-family checkpoint to put exits on (a folder, or a name on the Hugging Face hub)."""
        scales: str = ""
        """Sizes of model and data, with commas between them (those of the tier by default; for 3 tiny, s or l)."""
        seeds: str = "0,1,2"
        """With commas between them; the first one tries learning rates."""
        budget: float | None = None
        """Minutes after which no line is begun any more."""
        jobs: int = 1
        """Lines trained at a time, each on one thread."""
        device: str = "cpu"
        """cpu, cuda, mps or auto. The sizes that fit a laptop are faster on a CPU."""
        out: Path = Path("results/reproduce")
        """Where everything is kept."""

    given = tyro.cli(Arguments, args=args, prog="ease reproduce")
    root = Path(__file__).resolve().parents[3]
    if not (root / "experiments" / "reproduce.py").is_file():
        raise EaseError("the experiments do not come with the package: clone the repository and run ease from there")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    reproduce = importlib.import_module("experiments.reproduce")
    running = importlib.import_module("experiments.harness.running")
    try:
        seeds = tuple(map(int, given.seeds.split(",")))
    except ValueError:
        raise EaseError(f"seeds are numbers with commas between them, as in 0,1,2; got {given.seeds!r}") from None
    try:
        settings = running.Settings(given.out, seeds, given.jobs, given.budget, given.device)
        scales = tuple(filter(None, given.scales.split(",")))
        missing = reproduce.reproduce(given.tier, given.data, scales, settings, given.model)
    except KeyboardInterrupt:
        raise EaseError("interrupted: what was trained is kept, and the same command goes on") from None
    if missing:
        print(f"Not done yet, the same command goes on: {'; '.join(missing)}")
