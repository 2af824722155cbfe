"""Tier 3: the tables of tier 1 on user data: `ease reproduce 3 --data DATA [--model CHECKPOINT]`.

DATA                                                   task
a folder with train.jsonl of {"text", "label"}         labels
a folder with train.jsonl of {"prompt", "completion"}  completions, scored by ROUGE-L too
.jsonl, .csv or .parquet files, or hf:NAME/CONFIG      a stream of documents
any other text that `ease.load_corpus` reads           text, with a checkpoint only (without one, use tier 1)

Without a checkpoint, new standard models of several depths form the baseline front. With one, its layers are frozen,
exits are added after a third and two thirds of them, and the baseline front consists of the checkpoint as it is and
truncated at those layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ease
from ease.data.records import format_of
from ease.data.streaming import load_stream
from ease.data.tasks import load_classification, load_completion
from ease.devices import choose_device
from ease.errors import require
from ease.flops import full_depth_flops
from ease.hf import checkpoint as hf
from ease.hf.config import read_config
from ease.model_config import ModelConfig
from experiments.analysis.pages import write
from experiments.harness.candidates import SHARES
from experiments.harness.lab import Lab
from experiments.harness.line import BASE, CONTINUED, Line, baselines, grow, make, standard_names
from experiments.harness.measuring import Report
from experiments.harness.running import Experiment, Settings, run
from experiments.harness.task_labs import Checkpoint, CheckpointExamples, CheckpointStream, Examples, Stream
from experiments.strategies.classifier_exits import classifier_exits
from experiments.strategies.truncated import TruncatedConfig, unchanged

UNCHANGED = "checkpoint"
ACCEPTED = "a folder with train.jsonl (texts with labels, or prompts with completions), .jsonl documents or hf:NAME"


@dataclass(frozen=True)
class Size:
    """Sizes of training, and of new models."""

    lab: Mapping[str, Any]
    """Settings of the lab of new models."""
    depths: tuple[int, ...]
    """Depths of the standard models; deeper models have the depth of the last and an exit after the first."""
    tokenizer: str
    epochs: int
    """Epochs over examples that the deepest standard model could train for within a third of the budget."""
    budget: float
    """Training FLOPs of a line on a document stream."""
    held_out: int
    """Documents of a stream for validation, and for test."""
    buffer: int
    """Rows of a stream's shuffle buffer."""
    tune: Mapping[str, Any]
    """Settings of the lab for exits on a checkpoint."""
    tokens: int
    """Tokens that a checkpoint could read at full depth within a line's budget."""


SIZES = {
    "tiny": Size(
        {"dim": 16, "seq": 32, "batch": 8, "epoch_batches": 5, "eval_batches": (2, 3), "lrs": (1e-2,)},
        depths=(1, 2),
        tokenizer="bpe:300",
        epochs=2,
        budget=2e8,
        held_out=20,
        buffer=64,
        tune={"seq": 32, "batch": 8, "epoch_batches": 5, "eval_batches": (2, 3), "lrs": (5e-3,)},
        tokens=4_000,
    ),
    "s": Size(
        {"dim": 64, "seq": 128, "batch": 32, "epoch_batches": 200, "eval_batches": (20, 80), "lrs": (3e-3, 1e-2)}
        | {"mine_epochs": 4},
        depths=(1, 2, 4),
        tokenizer="bpe:2048",
        epochs=10,
        budget=8e12,
        held_out=500,
        buffer=4_096,
        tune={"seq": 256, "batch": 8, "epoch_batches": 200, "eval_batches": (20, 80), "lrs": (3e-3, 1e-2)},
        tokens=1_000_000,
    ),
    "l": Size(
        {"dim": 512, "seq": 512, "batch": 16, "epoch_batches": 500, "eval_batches": (40, 160), "lrs": (1e-3, 3e-3)}
        | {"heads": 8, "mine_epochs": 8},
        depths=(4, 8, 12),
        tokenizer="bpe:16384",
        epochs=10,
        budget=2e16,
        held_out=2_000,
        buffer=16_384,
        tune={"seq": 1024, "batch": 8, "epoch_batches": 500, "eval_batches": (20, 80), "lrs": (1e-3, 3e-3)},
        tokens=10_000_000,
    ),
}
LABS: dict[tuple[str, bool], type[Lab]] = {
    ("labels", False): Examples,
    ("completions", False): Examples,
    ("completions", True): CheckpointExamples,
    ("documents", False): Stream,
    ("documents", True): CheckpointStream,
    ("text", True): Checkpoint,
}
"""(kind of data, with a checkpoint) -> the lab."""
REFUSED = {
    (
        "labels",
        True,
    ): "a checkpoint has no head for labels: leave out --model, or give records with a prompt and a completion",
    (
        "text",
        False,
    ): f"{{data}} is no data for tier 3 without --model CHECKPOINT: add it, give {ACCEPTED}, or use tier 1",
}
TASK_METRICS = {"labels": ("acc", "f1"), "completions": ("acc", "rouge_l")}


def kind_of(data: str) -> str:
    """The kind of data: labels, completions, documents or text."""
    records = Path(data) / "train.jsonl"
    if records.is_file():
        with records.open(encoding="utf-8-sig", errors="replace") as file:
            line = next((line for line in file if line.strip()), "")
        try:
            found = set(json.loads(line))
        except (ValueError, TypeError):
            found = set()
        for kind, required in (("labels", {"text", "label"}), ("completions", {"prompt", "completion"})):
            if required <= found:
                return kind
        raise ease.EaseError(
            f"{records} begins with no record for tier 3 (fields: {', '.join(sorted(map(str, found))) or 'none'}): "
            'give {"text": ..., "label": ...} or {"prompt": ..., "completion": ...} a line'
        )
    return "documents" if data.startswith("hf:") or format_of(Path(data)) else "text"


# ---------------------------------------------------------------------------------------------------------
# Labs


def shape_of(model: str) -> ModelConfig:
    """A checkpoint's configuration, without reading its weights."""
    return read_config(hf.read_json(hf.checkpoint_folder(model) / hf.CONFIG))


def exits_of(layers: int) -> tuple[int, ...]:
    """Exits of a checkpoint with `layers` layers: after a third and two thirds of them."""
    return tuple(sorted({max(1, layers // 3), max(1, 2 * layers // 3)}))


def make_lab(name: str, data: str, model: str | None, device: str, allow_overlap: bool = False) -> Lab:
    """The lab for data, and a checkpoint if there is one, at a size of `SIZES`."""
    size, kind = SIZES[name], kind_of(data)
    read = partial(READ[kind], data=data, allow_overlap=allow_overlap)
    return new_lab(size, kind, data, read) if model is None else checkpoint_lab(size, kind, data, read, model, device)


def new_lab(size: Size, kind: str, data: str, read: Callable[..., Any]) -> Lab:
    """The lab for new models."""
    fields, tokenizer, about = read(size, size.lab, tokenizer=size.tokenizer, eos=None)
    heads = size.lab.get("heads", Lab.heads)
    tied = kind != "labels"  # labels have their own head
    shape = ModelConfig(tokenizer.get_vocab_size(), size.lab["dim"], size.depths[-1], heads, tie_embeddings=tied)
    budget = size.budget
    if kind != "documents":
        tokens = sum(len(example.ids) for example in fields["text"]["train"])
        length = max(1, tokens // len(fields["text"]["train"]))
        budget = 3 * size.epochs * tokens * full_depth_flops(shape, length)
    ends = {"brick": size.depths[0], "depth": size.depths[-1], "budget": rounded(budget), "tie_embeddings": tied}
    corpus = f"{called(data)}, {about}, {size.tokenizer}"
    return LABS[kind, False](corpus=corpus, vocab_size=shape.vocab_size, **ends, **size.lab, **fields)


def checkpoint_lab(size: Size, kind: str, data: str, read: Callable[..., Any], model: str, device: str) -> Lab:
    """The lab for exits on a checkpoint."""
    shape, settings = shape_of(model), dict(size.tune)
    if shape.max_positions:  # half of them, to leave positions for a completion
        settings["seq"] = min(settings["seq"], shape.max_positions // 2)
    fields, _, about = read(size, settings, tokenizer=hf.load_tokenizer(model), eos=hf.end_of_text(model))
    settings |= {name: getattr(shape, name) for name in ("vocab_size", "dim", "tie_embeddings")}
    # Layers that were not trained with exits keep their quality only where most tokens continue.
    settings |= {"shares": (*SHARES, 0.85, 0.95)}
    settings |= {"heads": shape.num_heads, "brick": exits_of(shape.num_layers)[0], "depth": shape.num_layers}
    budget = rounded(size.tokens * full_depth_flops(shape, settings["seq"]))
    corpus = f"{called(data)}, {about}; {Path(model).resolve().name}, of which only exits are trained"
    return LABS[kind, True](corpus=corpus, budget=budget, path=model, device=device, **settings, **fields)


def rounded(flops: float) -> float:
    return float(f"{flops:.3g}")


def read_examples(size: Size, settings: Mapping[str, Any], data: str, tokenizer: Any, **options: Any) -> Any:
    load = load_classification if kind_of(data) == "labels" else load_completion
    task = load(data, tokenizer, seq_len=settings["seq"], **options)
    about = f"texts with {len(task.labels)} labels" if task.labels else "prompts with completions"
    text = {"train": task.train, "val": task.val, "test": task.test}
    found = {"text": text, "task": task, "labels": len(task.labels) or None}
    counts = ", ".join(f"{len(examples):,} {split}" for split, examples in text.items())
    return found, task.tokenizer, f"{about} ({counts})"


def read_stream(size: Size, settings: Mapping[str, Any], data: str, tokenizer: Any, **options: Any) -> Any:
    sizes = {"seq_len": settings["seq"], "batch_size": settings["batch"], "held_out": size.held_out}
    sizes |= {"epoch_batches": settings["epoch_batches"], "buffer": size.buffer}
    stream = load_stream(data, tokenizer, **sizes, **options)
    found = {"text": {"val": stream.val, "test": stream.test}, "stream": stream.train, "buffer": size.buffer}
    return found, stream.tokenizer, "a stream of documents"


def read_text(size: Size, settings: Mapping[str, Any], data: str, tokenizer: Any, **options: Any) -> Any:
    corpus = ease.load_corpus(data, tokenizer, **options)
    return {"text": {"train": corpus.train, "val": corpus.val, "test": corpus.test}}, tokenizer, "text"


READ = {"labels": read_examples, "completions": read_examples, "documents": read_stream, "text": read_text}
"""Kind of data -> its reader, which returns fields of the lab, the tokenizer and a description."""


def called(data: str) -> str:
    """A source's name without its folder, so that reports contain no local paths."""
    return data if data.startswith("hf:") else Path(data).resolve().name


# ---------------------------------------------------------------------------------------------------------
# Lines


def new_lines(size: Size, kind: str) -> dict[str, Line]:
    """The lines of new models."""
    brick, deep = size.depths[0], size.depths[-1]
    joint = {"num_layers": deep, "exit_layer": brick, "routing_threshold": 0.0}
    lines = {
        **baselines(size.depths),
        "ASHEM": Line(grow(deep), on=BASE),
        "progressive growth": Line(make(ease.GrowthConfig, layers=size.depths)),
        "deep supervision": Line(make(ease.DeepSupervisionConfig, num_layers=deep)),
        "early exit": Line(make(ease.EarlyExitConfig, **joint)),
        "early exit, distilled": Line(make(ease.EarlyExitConfig, **joint, objective="both")),
    }
    if kind == "labels":  # one decision per text, by a head of negligible cost
        return lines
    gated = Line(make(ease.GatedConfig, deep_layers=deep, exit_layer=brick))
    return lines | {"gated": gated, "early exit, classifier exit": Line(classifier_exits, on="early exit")}


def checkpoint_lines(layers: int) -> dict[str, Line]:
    """The lines of a checkpoint with `layers` layers."""
    exits = exits_of(layers)
    truncated = partial(make, TruncatedConfig, weight_decay=0.0)
    tuned = partial(make, ease.TuneConfig, exits=exits, weight_decay=0.0)
    return {
        **{f"truncated after layer {k}": Line(truncated(num_layers=k)) for k in exits},
        UNCHANGED: Line(unchanged),
        "exits": Line(tuned()),
        "exits, distilled": Line(tuned(objective="distillation")),
        "exits with adapters": Line(tuned(adapter="mlp")),
        "exits with adapters, distilled": Line(tuned(adapter="mlp", objective="distillation")),
        "exits, distilled, classifier exit": Line(classifier_exits, on="exits, distilled"),
    }


# ---------------------------------------------------------------------------------------------------------
# Running


def experiment(
    name: str, data: str, model: str | None, device: str, seeds: Sequence[int], allow_overlap: bool = False
) -> Experiment:
    """Tier 3's experiment at a size of `SIZES`."""
    size, kind = SIZES[name], kind_of(data)
    task_metrics, options = TASK_METRICS.get(kind, ()), f"--data {called(data)}{' --allow-overlap' * allow_overlap}"
    if model is None:
        title, lines = f"{called(data)} at scale {name}", new_lines(size, kind)
        base, standard, compared_with = BASE, standard_names(size.depths), (CONTINUED,)
    else:
        layers = shape_of(model).num_layers
        if layers < 2:
            raise ease.EaseError(f"{model} has one layer and therefore no early exit: give a deeper checkpoint")
        title, lines = f"Exits on {Path(model).name} at scale {name}", checkpoint_lines(layers)
        truncated = [name for name in lines if name.startswith("truncated")]
        base, standard, compared_with = UNCHANGED, (*truncated, UNCHANGED), (UNCHANGED,)
        options = f"--model {Path(model).name} {options}"
    command = f"ease reproduce 3 {options} --seeds {','.join(map(str, seeds))} --scales {name}"
    report = Report(title, base, standard, compared_with, command=command, task_metrics=task_metrics)
    parts = ([] if model is None else [Path(model).resolve().name]) + [called(data).removeprefix("hf:"), name]
    folder = "-".join(re.sub(r"[^\w.-]+", "-", part) for part in parts)
    return Experiment(folder, partial(make_lab, name, data, model, device, allow_overlap), lines, report)


def reproduce(
    data: str | None, model: str | None, scales: Sequence[str], settings: Settings, allow_overlap: bool = False
) -> list[str]:
    """Train what is missing, and write tables and figures.

    Args:
        data: see the top of this file.
        model: a checkpoint, or None for new models.
        scales: names of `SIZES`; s by default.
        settings: output folder, seeds, parallel jobs and time budget.
        allow_overlap: accept data whose splits share most of their text, or records.

    Returns:
        The lines that are not trained yet.

    Raises:
        EaseError: data or checkpoint are not usable for this tier, or a package is missing.
    """
    if data is None:
        raise ease.EaseError(
            f"tier 3 has no data of its own: give --data {ACCEPTED}; or, for exits on a checkpoint, --model CHECKPOINT "
            "and any text"
        )
    if unknown := [name for name in scales if name not in SIZES]:
        raise ease.EaseError(f"unknown scale {unknown[0]!r}: use {', '.join(SIZES)}")
    kind = kind_of(data), model is not None
    if kind in REFUSED:
        raise ease.EaseError(REFUSED[kind].format(data=data))
    if kind[0] == "completions":
        require("rouge_score.rouge_scorer", "eval")
    settings.check()
    device = choose_device(settings.device)
    experiments = [experiment(name, data, model, device, settings.seeds, allow_overlap) for name in scales or ("s",)]
    return run(experiments, settings._replace(out=settings.out / "3"), write).missing
