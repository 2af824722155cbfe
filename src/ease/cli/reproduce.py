"""`ease reproduce`: the tables and figures of the paper."""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

from ease.errors import EaseError

USAGE = "TIER [--data D] [--model CHECKPOINT]"
HELP = "reproduce the paper's tables and figures (needs a checkout)"


def main(args: list[str]) -> None:
    """Run a tier of the experiments from the checkout that holds this package."""
    import tyro

    @dataclass(frozen=True)
    class Arguments:
        """Train the missing lines of a tier of the paper and write tables and figures."""

        tier: tyro.conf.Positional[str]
        """smoke (all code at a size without meaning), 1 (every strategy against standard models at equal training
        FLOPs), 2 (ablation of ASHEM) or 3 (the tables of tier 1 on your --data and --model)."""
        data: str | None = None
        """stdlib (by default), a folder with train.txt and valid.txt, a text file, wikitext-2, wikitext-103 or
        hf:NAME/CONFIG. For tier 3: a folder with train.jsonl (texts with labels, or prompts with completions); .jsonl,
        .json, .csv, .tsv or .parquet files or hf:NAME/CONFIG, read as a stream of documents; or, with --model, any
        text."""
        allow_overlap: bool = False
        """Accept --data whose splits share most of their text."""
        model: str | None = None
        """For tier 3: a Llama-family checkpoint to put exits on (a folder, a name on the Hugging Face hub, or a GGUF
        file)."""
        scales: str = ""
        """Sizes of model and data, separated by commas (those of the tier by default; for tier 3 tiny, s or l)."""
        seeds: str = "0,1,2"
        """Random seeds, separated by commas; the first one is also used to choose learning rates."""
        budget: float | None = None
        """Minutes after which no further line is started."""
        jobs: int = 1
        """Lines trained in parallel, each on one thread."""
        device: str = "cpu"
        """cpu, cuda, mps or auto; sizes that fit a laptop are faster on a CPU."""
        out: Path = Path("results/reproduce")
        """Folder of all results. Trained lines are stored in OUT/TIER, and the same command resumes where it was
        stopped; tables name the lines that are missing."""

    given = tyro.cli(Arguments, args=args, prog="ease reproduce", config=(tyro.conf.FlagCreatePairsOff,))
    root = Path(__file__).resolve().parents[3]
    if not (root / "experiments" / "reproduce.py").is_file():
        raise EaseError("the experiments are not part of the package: clone the repository and run ease from there")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    reproduce = importlib.import_module("experiments.reproduce")
    running = importlib.import_module("experiments.harness.running")
    try:
        seeds = tuple(map(int, given.seeds.split(",")))
    except ValueError:
        raise EaseError(f"seeds must be integers separated by commas, such as 0,1,2; got {given.seeds!r}") from None
    try:
        settings = running.Settings(given.out, seeds, given.jobs, given.budget, given.device)
        scales = tuple(filter(None, given.scales.split(",")))
        missing = reproduce.reproduce(
            given.tier, given.data, scales, settings, given.model, allow_overlap=given.allow_overlap
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("trained lines are stored, and the same command resumes") from None
    if missing:
        print(f"Incomplete; the same command resumes: {'; '.join(missing)}")
