"""Tier 3: the tables of tier 1 on what is given: `ease reproduce 3 --data DATA [--model CHECKPOINT]`.

DATA                                                   what is learned
a folder with train.jsonl of {"text", "label"}         labels
a folder with train.jsonl of {"prompt", "completion"}  completions, scored by ROUGE-L too
.jsonl or .parquet files, or hf:NAME/CONFIG            a stream of documents
any other text that `ease.load_corpus` reads           text, on a checkpoint only: tier 1 is that without one

Without a checkpoint, new models of several depths are the line to beat. With one, none of its layers learns, exits are
put after a third and two thirds of them, and the line to beat goes through the checkpoint as it is and cut there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ease
from ease import hf
from ease.errors import needs
from ease.flops import full_depth_flops
from ease.hf_config import read_config
from ease.machine import choose_device
from ease.models import ModelConfig
from ease.streaming import load_stream
from ease.tasks import load_classification, load_completion
from experiments.cut import CutConfig, whole
from experiments.fronts import Report
from experiments.headless import headless
from experiments.labs import Checkpoint, CheckpointExamples, CheckpointStream, Examples, Stream
from experiments.lines import Lab, Line, grow, make
from experiments.running import Experiment, Settings, run

BASE, WHOLE = "phase 1", "checkpoint"
PART = 0.6  # of the budget that phase 1 takes where lines share it
GIVE = "a folder with train.jsonl (texts with labels, or prompts with completions), .jsonl documents or hf:NAME"


@dataclass(frozen=True)
class Size:
    """How much is trained, and of a new model what."""

    lab: Mapping[str, Any]
    """Settings of the lab."""
    lrs: tuple[float, ...]
    dim: int
    depths: tuple[int, ...]
    """Of plain models; tokens leave after the first, of models as deep as the last."""
    tokenizer: str
    epochs: int
    """Over examples, of the deepest plain model."""
    budget: float
    """Training FLOPs of a line on a stream."""
    held_out: int
    """Documents of a stream for validation, and for test."""
    tuned: int
    """Tokens that a checkpoint could read at full depth within a line's budget."""
    tune_lrs: tuple[float, ...] = (1e-3, 5e-3)


SIZES = {
    "tiny": Size(
        {"seq": 32, "batch": 8, "epoch_batches": 5, "eval_batches": (2, 3)},
        (1e-2,),
        dim=16,
        depths=(1, 2),
        tokenizer="bpe:300",
        epochs=2,
        budget=2e8,
        held_out=20,
        tuned=4_000,
        tune_lrs=(5e-3,),
    ),
    "s": Size(
        {"seq": 128, "batch": 32, "epoch_batches": 200, "eval_batches": (20, 80), "mine_epochs": 4},
        (1e-3, 3e-3, 1e-2),
        dim=64,
        depths=(1, 2, 4),
        tokenizer="bpe:2048",
        epochs=10,
        budget=8e12,
        held_out=500,
        tuned=500_000,
    ),
    "l": Size(
        {"seq": 512, "batch": 16, "epoch_batches": 500, "eval_batches": (40, 160), "mine_epochs": 8},
        (1e-3, 3e-3),
        dim=512,
        depths=(4, 8, 12),
        tokenizer="bpe:16384",
        epochs=10,
        budget=1e17,
        held_out=2_000,
        tuned=5_000_000,
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
"""(kind of data, on a checkpoint) -> the lab."""
REFUSED = {
    ("labels", True): "a checkpoint has a head of tokens and none of labels: leave out --model, or give records with "
    "a prompt and a completion",
    ("text", False): f"{{data}} is no data for tier 3 without --model CHECKPOINT: add it, give {GIVE}, or take tier 1",
}
MEASURES = {"labels": ("acc", "f1"), "completions": ("acc", "rouge_l")}


def kind_of(data: str) -> str:
    """labels, completions, documents or text."""
    records = Path(data) / "train.jsonl"
    if records.is_file():
        with records.open(encoding="utf-8-sig", errors="replace") as file:
            line = next((line for line in file if line.strip()), "")
        try:
            found = set(json.loads(line))
        except (ValueError, TypeError):
            found = set()
        for kind, wanted in (("labels", {"text", "label"}), ("completions", {"prompt", "completion"})):
            if wanted <= found:
                return kind
        raise ease.EaseError(
            f"{records} begins with no record for tier 3 (fields: {', '.join(sorted(map(str, found))) or 'none'}): "
            'give {"text": ..., "label": ...} or {"prompt": ..., "completion": ...} a line'
        )
    files = Path(data).name
    return "documents" if data.startswith("hf:") or ".json" in files or files.endswith(".parquet") else "text"


# ---------------------------------------------------------------------------------------------------------
# Labs


def shape_of(model: str) -> ModelConfig:
    """Of a checkpoint, whose weights are not read."""
    return read_config(hf.read_json(hf.checkpoint_folder(model) / hf.CONFIG))


def cuts(layers: int) -> tuple[int, ...]:
    """A third and two thirds of a checkpoint's layers."""
    return tuple(sorted({max(1, layers // 3), max(1, 2 * layers // 3)}))


def make_lab(name: str, data: str, model: str | None, device: str) -> Lab:
    """What is given, at a size."""
    size, kind = SIZES[name], kind_of(data)
    settings, tokenizer, eos = dict(size.lab), size.tokenizer, None
    shape = None if model is None else shape_of(model)
    if shape and shape.max_positions:  # half of them, so that there are some for what is written
        settings["seq"] = min(settings["seq"], shape.max_positions // 2)
    if model is not None:
        tokenizer, eos = hf.load_tokenizer(model), hf.end_of_text(model)
    found, tokenizer, about = READ[kind](size, settings, data, tokenizer, eos)
    if shape is None:
        shape = ModelConfig(tokenizer.get_vocab_size(), size.dim, size.depths[-1], tie_embeddings=kind != "labels")
        found |= {"brick": size.depths[0], "lrs": size.lrs, "budget": size.budget}
        if examples := found["text"].get("train"):
            tokens = sum(len(example.ids) for example in examples)
            found["budget"] = 3 * size.epochs * tokens * full_depth_flops(shape, max(1, tokens // len(examples)))
    else:
        found |= {"brick": cuts(shape.num_layers)[0], "lrs": size.tune_lrs, "path": model, "device": device}
        found["budget"] = size.tuned * full_depth_flops(shape, settings["seq"])
        about += f"; the checkpoint {Path(str(model)).name}, of which exits alone learn"
    found["budget"] = float(f"{found['budget']:.3g}")
    made = {"vocab_size": shape.vocab_size, "dim": shape.dim, "depth": shape.num_layers, "heads": shape.num_heads}
    made |= {"corpus": about, "tie_embeddings": shape.tie_embeddings}
    return LABS[kind, model is not None](**made, **settings, **found)


def read_examples(size: Size, settings: dict[str, Any], data: str, tokenizer: Any, eos: int | None) -> Any:
    load = load_classification if kind_of(data) == "labels" else load_completion
    task = load(data, tokenizer, eos=eos, seq_len=settings["seq"])
    what = f"texts with {len(task.labels)} labels" if task.labels else "prompts with completions"
    text = {"train": task.train, "val": task.val, "test": task.test}
    found = {"text": text, "task": task, "labels": len(task.labels) or None}
    counts = ", ".join(f"{len(examples):,} {split}" for split, examples in text.items())
    return found, task.tokenizer, f"{called(data)}, {what} ({counts}), {spec(tokenizer)}"


def read_stream(size: Size, settings: dict[str, Any], data: str, tokenizer: Any, eos: int | None) -> Any:
    options = {"seq_len": settings["seq"], "batch_size": settings["batch"], "held_out": size.held_out, "eos": eos}
    stream = load_stream(data, tokenizer, **options, epoch_batches=settings["epoch_batches"])
    found = {"text": {"val": stream.val, "test": stream.test}, "stream": stream.train}
    return found, stream.tokenizer, f"{called(data)}, a stream of documents, {spec(tokenizer)}"


def read_text(size: Size, settings: dict[str, Any], data: str, tokenizer: Any, eos: int | None) -> Any:
    corpus = ease.load_corpus(data, tokenizer, eos=eos)
    found = {"text": {"train": corpus.train, "val": corpus.val, "test": corpus.test}}
    return found, tokenizer, f"{corpus.name}, {spec(tokenizer)}"


READ = {"labels": read_examples, "completions": read_examples, "documents": read_stream, "text": read_text}
"""Kind of data -> what reads it: fields of the lab, the tokenizer, and what to call it."""


def spec(tokenizer: Any) -> str:
    return tokenizer if isinstance(tokenizer, str) else "the checkpoint's tokenizer"


def called(data: str) -> str:
    """A source by its name: a path on this machine is nobody's business."""
    return data if data.startswith("hf:") else Path(data).resolve().name


# ---------------------------------------------------------------------------------------------------------
# Lines


def plain_names(size: Size) -> tuple[str, ...]:
    return tuple(f"plain, layers: {k}" for k in size.depths)


def new_lines(size: Size, kind: str) -> dict[str, Line]:
    """Of new models."""
    brick, deep = size.depths[0], size.depths[-1]
    shallow = make(ease.StandardConfig, num_layers=brick)
    models = [Line(make(ease.StandardConfig, num_layers=k)) for k in size.depths]
    joint = {"num_layers": deep, "exit_layer": brick, "routing_threshold": 0.0}
    lines = {
        BASE: Line(shallow, share=PART),
        **dict(zip(plain_names(size), models, strict=True)),
        "continued": Line(shallow, on=BASE),
        "ASHEM": Line(grow(deep), on=BASE),
        "deep supervision": Line(make(ease.DeepSupervisionConfig, num_layers=deep)),
        "early exit": Line(make(ease.EarlyExitConfig, **joint)),
        "early exit, distilled": Line(make(ease.EarlyExitConfig, **joint, objective="both")),
    }
    if kind == "labels":  # decided once a text, by a head that costs next to nothing
        return lines
    gated = Line(make(ease.GatedConfig, deep_layers=deep, exit_layer=brick))
    return lines | {"gated": gated, "early exit, no head asked": Line(headless, on="early exit")}


def checkpoint_lines(layers: int) -> dict[str, Line]:
    """Of a checkpoint of so many layers."""
    tuned = partial(make, ease.TuneConfig, exits=cuts(layers), weight_decay=0.0)
    return {
        **{f"cut after layer {k}": Line(make(CutConfig, num_layers=k, weight_decay=0.0)) for k in cuts(layers)},
        WHOLE: Line(whole),
        "exits": Line(tuned()),
        "exits, distilled": Line(tuned(objective="distillation")),
        "exits with adapters": Line(tuned(adapter="mlp")),
        "exits with adapters, distilled": Line(tuned(adapter="mlp", objective="distillation")),
        "exits, distilled, no head asked": Line(headless, on="exits, distilled"),
    }


# ---------------------------------------------------------------------------------------------------------
# Running


def experiment(name: str, data: str, model: str | None, device: str, seeds: Sequence[int]) -> Experiment:
    size, kind = SIZES[name], kind_of(data)
    measures, told = MEASURES.get(kind, ()), f"--data {called(data)}"
    if model is None:
        title, lines = f"{called(data)} at scale {name}", new_lines(size, kind)
        base, plain, beside = BASE, plain_names(size), ("continued",)
    else:
        layers = shape_of(model).num_layers
        if layers < 2:
            raise ease.EaseError(f"{model} has one layer, after which all tokens leave: give a deeper checkpoint")
        title, lines = f"Exits on {Path(model).name} at scale {name}", checkpoint_lines(layers)
        base, plain, beside = WHOLE, (*(n for n in lines if n.startswith("cut")), WHOLE), (WHOLE,)
        told = f"--model {Path(model).name} {told}"
    command = f"ease reproduce 3 {told} --seeds {','.join(map(str, seeds))} --scales {name}"
    report = Report(title, base, plain, beside, command=command, measures=measures)
    parts = ([] if model is None else [Path(model).resolve().name]) + [called(data).removeprefix("hf:"), name]
    folder = "-".join(re.sub(r"[^\w.-]+", "-", part) for part in parts)
    return Experiment(folder, partial(make_lab, name, data, model, device), lines, report)


def reproduce(data: str | None, model: str | None, scales: Sequence[str], settings: Settings) -> list[str]:
    """Trains what is missing, and writes tables and figures; returns what is still missing.

    Args:
        data, model: see the top of this file.
        scales: of `SIZES`; s by default.

    Raises:
        EaseError: what is given is no data or no checkpoint for this tier, or a package is missing.
    """
    if data is None:
        raise ease.EaseError(
            f"tier 3 has no data of its own: give --data {GIVE}; or, for exits on a checkpoint, --model CHECKPOINT and "
            "any text"
        )
    if unknown := [name for name in scales if name not in SIZES]:
        raise ease.EaseError(f"unknown scale {unknown[0]!r}: use {', '.join(SIZES)}")
    what = kind_of(data), model is not None
    if what in REFUSED:
        raise ease.EaseError(REFUSED[what].format(data=data))
    if what[0] == "completions":
        needs("rouge_score.rouge_scorer", "eval")
    settings.check()
    device = choose_device(settings.device)
    made = [experiment(name, data, model, device, settings.seeds) for name in scales or ("s",)]
    return run(made, settings._replace(out=settings.out / "3")).missing
