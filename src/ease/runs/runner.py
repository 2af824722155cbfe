"""Execution of a run: one recipe from data to report, with baselines at equal training FLOPs.

The phases of the strategy are trained first, then the baselines (`ease.runs.baselines`) on the same data. All lines are
scored on the test split once; the hard tokens are those of phase 1's final model.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ease.data.corpus import Corpus
from ease.data.streaming import STREAM
from ease.data.tokenizers import save_tokenizer
from ease.devices import machine
from ease.errors import EaseError, check_counts
from ease.files import write_checksums
from ease.flops import head_flops, layer_flops
from ease.hf.prompting import copy_prompting
from ease.models import StandardTransformer
from ease.progress import Progress
from ease.report.page import write_report
from ease.runs.baselines import train_baselines
from ease.runs.config import SELF, RunConfig
from ease.runs.context import RunContext
from ease.runs.explorer import explorer_data
from ease.runs.lines import StrategyLines, TrainedLine, train_strategy
from ease.runs.log import LOG_EVERY, METRICS
from ease.runs.metrics import decoding_metrics, draft_metrics, run_metrics
from ease.runs.record import RECORD, record_start
from ease.runs.reopen import load_start
from ease.runs.self_text import self_text
from ease.runs.store import FILES, START, can_resume, save_model, start_files
from ease.runs.text import load_text
from ease.runs.tracking import TENSORBOARD, TRACKERS, TrackedRun, check_trackers
from ease.storage import fingerprint, output_folder, partial_folder, write_json
from ease.strategies import STRATEGIES
from ease.training.distributed import in_turn, leave_group, process, process_group, processes
from ease.version import __version__


def run(
    config: RunConfig[Any],
    out: Path,
    *,
    overwrite: bool = False,
    track: Sequence[str] = (),
    log_every: int = LOG_EVERY,
    progress: Callable[[str], Progress] = lambda line: Progress(),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Execute a run and write its folder.

    The folder appears when the run is complete. Until then its files are in `.NAME.partial` in the same parent folder,
    from which the same call resumes after a kill or an interrupt.

    Of processes that torchrun started, all train, and the first one reports progress and writes. The run may be resumed
    with another number of them.

    Args:
        config: configuration of the run.
        out: the run folder.
        overwrite: replace an existing run, and discard an unfinished run with another configuration.
        track: names of trackers that also receive the metrics: tensorboard, wandb, trackio.
        log_every: optimizer steps between two rows of metrics.jsonl.
        progress: makes the progress of a line from its name.
        say: receives a sentence of the device that "auto" chose, and one when an unfinished run is resumed.

    Returns:
        The content of summary.json; nothing in processes other than the first.

    Raises:
        EaseError: the folder exists or cannot be written, an unfinished run has another configuration, or data, model
            and configuration do not fit together, or a tracker is unknown or not installed.
    """
    check_trackers(track)
    check_counts(1, log_every=log_every)
    with process_group(config.device) as device:
        first = process() == 0
        reads = (config.data.source.removeprefix(SELF).removeprefix("hf:"), *([config.start] if config.start else []))
        with output_folder(out, overwrite, resumable=True, reads=reads) if first else nullcontext():
            if not first:
                progress, say = (lambda line: Progress()), (lambda text: None)
            with in_turn():
                context, record = _prepare(config, partial_folder(out), device, overwrite, progress, say)
            if config.device == "auto":
                name = machine(device)["device"]
                say(f"device auto chose {device}{f' ({name})' if name != device else ''}")
            context.log_every = log_every
            with ExitStack() as end:
                if first:
                    settings = describe_settings(config, context.corpus)
                    start = record_start(context.folder, config.name, settings, device)
                    tracked = TrackedRun(out.name, start["id"], context.folder, settings)
                    context.trackers = [TRACKERS[name](tracked) for name in track]
                    for tracker in context.trackers:
                        end.callback(tracker.finish)
                trained = train_strategy(context)
                lines = [*trained.lines, *train_baselines(context, trained)]
            number = processes()
            leave_group()  # one process does the rest
            return _write(context, trained, lines, record, number) if first else {}


def _prepare(
    config: RunConfig[Any],
    folder: Path,
    device: str,
    overwrite: bool,
    progress: Callable[[str], Progress],
    say: Callable[[str], None],
) -> tuple[RunContext, dict[str, Any]]:
    """Model, data, and folder of a run, before its training, and what config.json records about the data."""
    data, first = config.data, process() == 0
    given = None
    if config.start is None and config.strategy.num_layers is None:
        raise EaseError("this strategy needs a trained model: name a checkpoint with --start")
    if config.start is None and getattr(config.strategy, "pretrained", False):
        raise EaseError("pretrained means that phase 1 is already trained: name its model with --start")
    if config.start is not None:
        given = load_start(config.start, config.dtype, split_special_tokens=data.split_special_tokens)
    start, tokenizer, eos = (given.model, given.tokenizer, given.eos) if given else (None, data.tokenizer, None)
    if first:
        shutil.rmtree(folder / START, ignore_errors=True)
        if given and given.checkpoint is not None:
            copy_prompting(given.checkpoint, folder / START, config=True)
    limit = None if start is None else start.config.max_positions
    if limit is not None and data.seq_len > limit:
        raise EaseError(f"{config.start} has {limit} positions: set --data.seq-len to at most that, not {data.seq_len}")
    text, own = data.source, data.source.startswith(SELF)
    if given and own:
        given.model.to(device)
        making = progress("making text")
        text = str(self_text(data, given, folder, seed=config.seed, overwrite=overwrite, progress=making))
    # No two splits of text that the model made have a prompt in common, however alike its continuations are.
    allowed = data.allow_overlap or own
    corpus = load_text(text, tokenizer, eos=eos, max_tokens=data.max_tokens, allow_overlap=allowed)
    if own:
        corpus = replace(corpus, name=SELF + Path(data.source.removeprefix(SELF)).name)
    if first:
        if can_resume(folder, run_identity(config, corpus, start), overwrite):
            say(f"resuming the unfinished run in {folder}")
        else:
            for name in (METRICS, RECORD):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
    context = RunContext(config, folder, corpus, device, progress, start)
    context.batches("test")  # raises on a text that is too short, before training
    kind = STREAM if data.source.startswith(STREAM) else ""
    path = Path(data.source.removeprefix(kind))
    local = path.exists() or (kind and path.parent.is_dir() and not path.as_posix().startswith("hf:"))
    record: dict[str, Any] = {"source": f"{kind}{path.resolve()}" if local else data.source}
    if own:
        record["source"] = SELF  # the text is in the run's own folder
    record |= {"hash": corpus.hash, "given": start is not None, "eos": eos, "add_special_tokens": True}
    record["split_special_tokens"] = bool(corpus.tokenizer.encode_special_tokens)
    return context, record


def _write(
    context: RunContext, trained: StrategyLines, lines: list[TrainedLine], record: dict[str, Any], number: int
) -> dict[str, Any]:
    """Scores the lines of a run that `number` processes trained, and writes its folder; gives summary.json."""
    config, folder, corpus, progress = context.config, context.folder, context.corpus, context.progress
    final, mined = trained.final, getattr(trained.strategy, "mined", [])
    summary = describe(config, corpus, final.model, context.device)
    summary["machine"]["processes"] = number
    val, test = context.batches("val"), context.batches("test")
    scoring = progress("scoring")
    summary |= run_metrics(lines, trained.base, final, val, test, mined, context.in_sample, scoring)
    summary["generation"] = decoding_metrics(final, test, progress)
    summary["drafts"] = draft_metrics(final.model, test)
    save_model(folder, final.model, final.policy, ease_version=__version__, run=summary["config"], data=record)
    save_tokenizer(corpus.tokenizer, folder / "tokenizer.json")
    write_json(folder / "summary.json", summary)
    write_json(folder / "explorer.json", explorer_data(final, corpus, test, summary["sweep"]["points"]))
    write_checksums(folder, (*FILES, *start_files(folder)))
    write_report([folder], folder / "report.html")
    return summary


def run_identity(config: RunConfig[Any], corpus: Corpus, start: StandardTransformer | None) -> dict[str, Any]:
    """Everything that determines the results of a run; an unfinished run resumes only under the same identity."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return {
        "ease": f"{__version__} {code.hexdigest()}",
        "strategy": type(config.strategy).__qualname__,
        "config": asdict(config) | {"execution": config.execution.identity()},
        "text": corpus.hash,
        "start": start and fingerprint(start),
    }


def describe(config: RunConfig[Any], corpus: Corpus, model: StandardTransformer, device: str) -> dict[str, Any]:
    """The part of summary.json that describes the run: configuration, data, model and machine."""
    data, settings = config.data, describe_settings(config, corpus)
    return {
        "format": 1,
        "ease_version": __version__,
        "name": config.name,
        "strategy": settings["strategy"]["name"],
        "note": config.note,
        "seed": config.seed,
        "data": {**corpus.describe(), "seq_len": data.seq_len, "batch_size": data.batch_size},
        "machine": machine(device),
        "model": asdict(model.config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "head_in_layers": head_flops(model.config, 1) / layer_flops(model.config, 1, 1, (data.seq_len + 1) // 2),
        "config": settings,
    }


def describe_settings(config: RunConfig[Any], corpus: Corpus) -> dict[str, Any]:
    """The configuration of a run as its folder records it."""
    kind = type(config.strategy)
    name = next((n for n, listed in STRATEGIES.items() if kind is listed), kind.__name__)
    return {
        "strategy": {"name": name, **asdict(config.strategy)},
        "model": asdict(config.model) if config.start is None else None,  # an initial model has its own shape
        # Reports are shared, so they name the corpus instead of a path on this machine.
        "data": asdict(replace(config.data, source=corpus.name)),
        "compare": config.compare,
        "compare_layers": config.compare_layers,
        "seed": config.seed,
        "execution": asdict(replace(config.execution, profile=None)),
        "start": config.start and Path(config.start).name,
    }
