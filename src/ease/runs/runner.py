"""A run: one recipe from data to report, with the lines that its gain has to be shown beside.

The strategy's phases come first. Then, at the same training FLOPs and on the same data, the lines to compare with:
phase 1 trained on, a plain model of full depth, deep supervision with the same exits. All are scored on the test
split once, and the hard tokens are those of phase 1's final model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ease.data.corpus import Corpus, load_corpus
from ease.devices import choose_device, machine
from ease.errors import EaseError
from ease.flops import head_flops, layer_flops
from ease.models import StandardTransformer
from ease.progress import Progress
from ease.report.page import write_report
from ease.runs.config import RunConfig
from ease.runs.context import RunContext
from ease.runs.explorer import explorer
from ease.runs.metrics import decoding, figures
from ease.runs.reopen import load_start
from ease.runs.store import can_resume, save_model
from ease.storage import fingerprint, run_folder, write_json
from ease.strategies import STRATEGIES
from ease.version import __version__

if TYPE_CHECKING:
    pass


def run(
    config: RunConfig[Any],
    out: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[str], Progress] = lambda line: Progress(),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Executes a run and writes its folder; returns the summary.

    After a kill the same call goes on where it was, from what lies in `.NAME.partial` beside the folder.

    Args:
        out: the run's folder; it appears when all is done.
        overwrite: replace a run that is there, and discard an unfinished one that was begun otherwise.
        watch: makes, from the name of a line, what is told of its steps and epochs.
        say: is told, in a sentence, when an unfinished run goes on.
    """
    device = choose_device(config.device)
    if config.start is not None and Path(config.start).exists() and Path(config.start).resolve() == out.resolve():
        raise EaseError(f"{out} is the model to start from: choose another --out")
    with run_folder(out, overwrite, resumable=True) as folder:
        data = config.data
        start, tokenizer, eos = load_start(config.start, config.dtype) if config.start else (None, data.tokenizer, None)
        most = None if start is None else start.config.max_positions
        if most is not None and data.seq_len > most:
            raise EaseError(
                f"{config.start} has {most} positions: set --data.seq-len to at most that, not {data.seq_len}"
            )
        corpus = load_corpus(data.source, tokenizer, eos=eos, max_tokens=data.max_tokens)
        if can_resume(folder, plan(config, corpus, start), overwrite):
            say(f"going on with the unfinished run in {folder}")
        (folder / "metrics.jsonl").unlink(missing_ok=True)  # every line tells its epochs again
        context = RunContext(config, folder, corpus, device, progress, start)
        context.batches("test")  # too short a text should be told before training, not after
        lines, phases, strategy = context.strategy_lines()
        final, (base, _) = lines[-1], context.base(lines, phases)
        lines = [*lines, *context.baselines(lines, phases)]

        summary = describe(config, corpus, final.model, context.device)
        val, test = context.batches("val"), context.batches("test")
        mined = getattr(strategy, "mined", [])
        summary |= figures(lines, base, final, val, test, mined, context.in_sample, context.progress("scoring"))
        summary["generation"] = decoding(final, test, progress)
        local = Path(data.source).exists()
        source: dict[str, Any] = {"source": str(Path(data.source).resolve()) if local else data.source}
        source |= {"hash": corpus.hash, "given": start is not None, "eos": eos}
        save_model(folder, final.model, final.policy, ease_version=__version__, run=summary["config"], data=source)
        corpus.tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "summary.json", summary)
        write_json(folder / "explorer.json", explorer(final, corpus, test, summary["sweep"]["points"]))
        write_report([folder], folder / "report.html")
    return summary


def plan(config: RunConfig[Any], corpus: Corpus, start: StandardTransformer | None) -> dict[str, Any]:
    """Everything that decides what a run does: an unfinished one goes on under the same plan alone."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return {
        "ease": f"{__version__} {code.hexdigest()}",
        "strategy": type(config.strategy).__qualname__,
        "config": asdict(config),
        "text": corpus.hash,
        "start": start and fingerprint(start),
    }


def describe(config: RunConfig[Any], corpus: Corpus, model: StandardTransformer, device: str) -> dict[str, Any]:
    """What was run, on what, where: the part of a summary that no figure is in."""
    data = config.data
    kind = type(config.strategy)
    name = next((n for n, listed in STRATEGIES.items() if kind is listed), kind.__name__)
    return {
        "format": 1,
        "ease_version": __version__,
        "name": config.name,
        "strategy": name,
        "note": config.note,
        "seed": config.seed,
        "data": {**corpus.describe(), "seq_len": data.seq_len, "batch_size": data.batch_size},
        "machine": machine(device),
        "model": asdict(model.config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "head_in_layers": head_flops(model.config, 1) / layer_flops(model.config, 1, 1, (data.seq_len + 1) // 2),
        # Reports are passed on, and a path on this machine is nobody's business: the corpus has a name.
        "config": {
            "strategy": {"name": name, **asdict(config.strategy)},
            "model": asdict(config.model) if config.start is None else None,  # a model that came has its own shape
            "data": asdict(replace(data, source=corpus.name)),
            "compare": config.compare,
            "seed": config.seed,
            "start": config.start and Path(config.start).name,
        },
    }
