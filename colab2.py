"""The original ASHEM experiment: a shallow model is trained first, new layers are then trained on its hard tokens.

    python colab2.py                             # WikiText-2 from the Hugging Face hub
    python colab2.py --data path/to/wikitext-2   # a folder with train.txt, valid.txt and test.txt

The recipe and its sizes are those of the original implementation. The script reports two kinds of figures:

- in-sample: the recipe mines hard tokens in the validation split, trains phase 2 on them, uses them for early
  stopping and scores on them. These figures measure how well the model fits those tokens, not how it generalizes.
- held-out: the final model with the same threshold on the test split, which no training and no choice used.

Requires the dependencies of the package and, without --data, `datasets`; the package itself need not be installed.
The training code is the package's; this script configures the recipe, prints the figures and saves them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))

import argparse
import copy
import json
import math
import shutil
import textwrap
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

import ease
from ease import ASHEMConfig, Data, EaseError, Phase, StandardTransformer, TokenBatches, Trainer, score
from ease.progress import Progress, StepMetrics
from experiments.utils import create_wikitext_dataloaders, get_device, load_wikitext_words, set_seed

IN_SAMPLE = "validation tokens: early stopping of both phases and the training data of phase 2"
HELD_OUT = "test tokens: not used for any choice, scored once with the final model and the threshold mined above"
EXPERIMENT = "ASHEM, the original recipe"
EVEN = 0.01  # perplexities closer than this (relative) count as even: a single seed cannot order them


@dataclass(frozen=True)
class Settings:
    """One run; the defaults are the original experiment."""

    data: str | None = None
    """A folder with train.txt, valid.txt and test.txt; None loads WikiText-2 from the hub."""
    num_samples: int = 10_000
    """Training samples of seq_len + 1 words; the validation set has a fifth as many."""
    seq_len: int = 32
    """Tokens in a sequence."""
    batch_size: int = 64
    """Sequences in a batch."""
    dim: int = 64
    """Width of the model."""
    num_heads: int = 4
    """Attention heads."""
    max_epochs: int = 100
    """Maximum number of epochs of each phase; early stopping usually ends a phase sooner."""
    seed: int = 42
    """Random seed of the weights and of the batch order."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise EaseError(f"seed must lie in 0..{2**32 - 1}, got {self.seed}")

    def ashem(self) -> ASHEMConfig:
        return ASHEMConfig(
            protocol="original",
            phase1_layers=2,
            phase1_lr=1e-3,
            phase1_patience=1,
            hard_example_ratio=0.5,
            phase2_layers=4,
            phase2_lr=1e-4,
            phase2_patience=3,
            phase1_max_epochs=self.max_epochs,
            phase2_max_epochs=self.max_epochs,
            seed=self.seed,
        )

    def model(self, vocab_size: int) -> StandardTransformer:
        # Untied: phase 2 of the original recipe trains the output head. With a tied head the embedding would change
        # too, and the stored hidden states of the hard tokens would no longer match the model.
        return StandardTransformer(
            vocab_size, self.dim, self.ashem().num_layers, self.num_heads, dropout=0.1, tie_embeddings=False
        )


class Status:
    """Progress on standard output, between the lines that stay.

    In a terminal and in a notebook one line is rewritten in place. Where output is piped, a new line is printed about
    every 10 seconds.
    """

    def __init__(self) -> None:
        terminal, notebook = sys.stdout.isatty(), type(sys.stdout).__module__.startswith("ipykernel")
        self.in_place = terminal or notebook
        self.interval = 0.2 if terminal else 1.0 if notebook else 10.0  # seconds; every update of a notebook is sent
        self.columns = min(79, shutil.get_terminal_size().columns - 1)  # a line that wraps cannot be rewritten
        self.last, self.width = time.monotonic(), 0

    def show(self, text: str, at_once: bool = False) -> None:
        """Shows `text` if the interval has passed; `at_once` shows it regardless, but only in place."""
        now = time.monotonic()
        if now - self.last < self.interval and not (at_once and self.in_place):
            return
        self.last = now
        if self.in_place:
            text = text[: self.columns]
            print(f"\r{text:<{self.width}}", end="", flush=True)
            self.width = len(text)
        else:
            print(text, flush=True)

    def print(self, text: str) -> None:
        """Prints lines that stay, in place of the progress line."""
        self.clear()
        print(text, flush=True)

    def clear(self) -> None:
        """Removes the progress line."""
        if self.width:
            print("\r" + " " * self.width, end="\r", flush=True)
            self.width = 0


class PhaseProgress(Progress):
    """The progress of one phase: a status line per batch and a line that stays per epoch."""

    def __init__(self, status: Status, phase: Phase, mined: Sequence[Mapping[str, Any]]) -> None:
        self.status, self.name, self.batches = status, phase.name, len(phase.train)
        self.epochs, self.batch, self.start = 0, 0, time.monotonic()
        layers = f"layers {max(1, phase.first)} to {max(phase.config.weights)}"
        status.print(f"\n{self.name}: {layers}, learning rate {phase.options.lr:g}, patience {phase.options.patience}")
        for found in mined:
            status.print(
                f"in-sample threshold {found['threshold']:.4f}: {found['count']:,} of {found['of']:,} tokens "
                f"are hard ({found['count'] / found['of']:.1%})"
            )

    def step(self, fraction: float, metrics: StepMetrics | None = None) -> None:
        # `fraction` refers to the maximum number of epochs, which early stopping rarely reaches.
        if self.batch == 0 and fraction >= 1 and self.epochs:
            return  # early stopping ends the phase, without another batch
        self.batch += 1
        at = f"{self.name}, epoch {self.epochs + 1}: batch {self.batch} of {self.batches}"
        if self.batch == self.batches:
            self.status.show(f"{at}, validating", at_once=True)
        else:
            seconds, loss = time.monotonic() - self.start, metrics.loss if metrics else math.nan
            self.status.show(f"{at} ({self.batch / self.batches:.0%}), training loss {loss:.2f}, {seconds:.0f} s")

    def epoch(self, row: Mapping[str, float]) -> None:
        self.epochs, self.batch = self.epochs + 1, 0
        self.status.print(
            f"in-sample {self.name}, epoch {row['epoch']:2.0f}: PPL {row['val_ppl']:.2f}, acc {row['val_acc']:.2%}"
            f"   (training loss {row['train_loss']:.4f}, {row['seconds']:.0f} s)"
        )


class StageProgress(Progress):
    """The progress of mining."""

    def __init__(self, status: Status, name: str) -> None:
        self.status, self.name = status, name

    def step(self, fraction: float, metrics: StepMetrics | None = None) -> None:
        self.status.show(f"{self.name}: {fraction:.0%}")


def experiment(settings: Settings, status: Status) -> dict[str, Any]:
    """Runs both phases, prints their progress, and returns the content of summary.json."""
    device, ashem = get_device(), settings.ashem()
    name = "WikiText-2 (hub)" if settings.data is None else Path(settings.data).name
    status.print(f"reading {name}")
    train, val, vocab_size = create_wikitext_dataloaders(
        settings.num_samples, settings.batch_size, settings.seq_len, settings.seed, settings.data
    )
    words, _ = load_wikitext_words(settings.data)
    test = TokenBatches(words["test"], settings.seq_len, settings.batch_size, drop_last=False)
    set_seed(settings.seed)
    model, strategy = settings.model(vocab_size), ashem.strategy()
    status.print(f"{EXPERIMENT} on {name}: {vocab_size:,} words, {device.type}, random seed {settings.seed}")
    status.print(f"in-sample figures are measured on {IN_SAMPLE}")

    phases = ease.train(
        model,
        strategy,
        Data(train, val, lambda stage: StageProgress(status, stage)),
        device=device,
        progress=lambda phase: PhaseProgress(status, phase, strategy.mined),
    )
    done = [next(phases)]
    shallow = copy.deepcopy(model)  # the final model of phase 1, which defines the hard tokens of every split
    done += phases
    final_phase = done[-1][0]
    threshold = strategy.mined[0]["threshold"]

    def figures(batches: TokenBatches, split: str) -> dict[str, Any]:
        """Figures of phase 1 alone and of the final model with routing, on the same hard tokens."""
        status.show(f"scoring the {split} split with phase 1 alone", at_once=True)
        alone = score(shallow, batches)
        status.show(f"scoring the {split} split with the final model", at_once=True)
        routed = score(model, batches, strategy.policy())
        hard = alone.confidences < threshold
        count = int(hard.sum())
        return {
            "tokens": len(hard),
            "hard_tokens": count,
            "hard_ratio": count / len(hard),
            # In terms of the final model's layers, every token leaves at the exit of phase 1.
            "phase_1": alone.metrics(hard, depth=ashem.phase2_layers) | {"shallow_ratio": 1.0},
            "final": routed.metrics(hard),
        }

    in_sample, held_out = figures(val, "validation"), figures(test, "test")
    status.show("scoring the hard tokens as trained", at_once=True)
    before, after = in_sample["phase_1"]["hard_ppl"], hard_ppl_as_trained(model, final_phase, device)
    full_depth = score(model, [next(iter(test))])  # every layer and one head per token, the same in every batch
    in_sample["threshold"] = threshold
    in_sample["hard_tokens_mined"] = strategy.mined[0]["count"]
    in_sample["final"] |= {"hard_ppl_as_trained": after, "improvement": before - after}
    return {
        "experiment": EXPERIMENT,
        "ease": ease.__version__,
        "data": {"name": name, "vocab_size": vocab_size},
        "settings": asdict(settings) | {"data": name},
        "ashem": asdict(ashem),
        "model": asdict(model.config),
        "full_depth_flops_per_token": full_depth.flops / full_depth.processed,
        "phases": [
            {
                "name": phase.name,
                "best_epoch": history.best_epoch,
                "stopped_early": history.stopped_early,
                "flops": history.flops,
                "seconds": history.seconds,
                "in_sample_epochs": history.rows,
            }
            for phase, history in done
        ],
        "in_sample": {"measured_on": IN_SAMPLE} | in_sample,
        "held_out": {"measured_on": HELD_OUT} | held_out,
    }


@torch.no_grad()
def hard_ppl_as_trained(model: StandardTransformer, phase: Phase, device: torch.device) -> float:
    """Perplexity of the hard tokens as phase 2 trains on them: each alone, from its stored state, without routing."""
    trainer, loss, tokens = Trainer(phase.config, model.config.vocab_size, device), 0.0, 0
    model.eval()
    for batch in phase.train:
        mean = trainer.compute_loss(model, batch.x, batch.y, state=batch.state, first=phase.first)
        loss, tokens = loss + mean.item() * batch.y.numel(), tokens + batch.y.numel()
    return math.exp(loss / tokens)


def in_sample_table(summary: Mapping[str, Any]) -> str:
    """The figures that the original recipe reports, each labeled in-sample."""
    found = summary["in_sample"]
    one, final, before = found["phase_1"], found["final"], found["phase_1"]["hard_ppl"]

    def gain(after: float) -> str:
        return f"{before - after:.2f} ({(before - after) / before:.1%})"

    rows = [
        ("threshold", f"{found['threshold']:.4f}", ""),
        ("hard tokens", f"{found['hard_tokens_mined']:,}", f"of {found['tokens']:,}"),
        ("hard ratio", f"{found['hard_tokens_mined'] / found['tokens']:.2%}", ""),
        ("PPL, phase 1", f"{one['ppl']:.2f}", f"accuracy {one['acc']:.2%}"),
        ("PPL, routed", f"{final['ppl']:.2f}", f"accuracy {final['acc']:.2%}"),
        ("hard PPL before", f"{before:.2f}", "phase 1, tokens in their sequences"),
        (
            "hard PPL after",
            f"{final['hard_ppl_as_trained']:.2f}",
            "as trained: each alone, from its stored state",
        ),
        ("improvement", gain(final["hard_ppl_as_trained"]), ""),
        ("hard PPL after, routed", f"{final['hard_ppl']:.2f}", "the same tokens in their sequences, with routing"),
        ("improvement, routed", gain(final["hard_ppl"]), ""),
        ("shallow ratio", f"{final['shallow_ratio']:.1%}", "tokens that leave at the exit of phase 1"),
        ("compute cost", f"{final['compute_cost']:.1%}", "share of layers run; excludes the output heads"),
    ]
    lines = [f"in-sample {name:<24}{value:>16}   {note}".rstrip() for name, value, note in rows]
    return "\n".join([f"in-sample, measured on {IN_SAMPLE}", *lines])


def held_out_table(summary: Mapping[str, Any]) -> str:
    """The figures of phase 1 alone and of the final model on the test split, with notes on the costs."""
    found = summary["held_out"]
    one, final = found["phase_1"], found["final"]
    rows = [
        ("PPL", "ppl", "{:.2f}"),
        ("accuracy", "acc", "{:.2%}"),
        ("hard PPL (before, after)", "hard_ppl", "{:.2f}"),
        ("easy PPL", "easy_ppl", "{:.2f}"),
        ("shallow ratio", "shallow_ratio", "{:.1%}"),
        ("compute cost (layers)", "compute_cost", "{:.1%}"),
        ("FLOPs/token, with heads", "flops_per_token", "{:,.0f}"),
    ]
    lines = [f"held-out {name:<25}{form.format(one[key]):>16}{form.format(final[key]):>16}" for name, key, form in rows]
    config = summary["model"]
    layers = config["vocab_size"] / (12 * config["dim"])
    return "\n".join(
        [
            f"held-out, on {found['tokens']:,} {HELD_OUT}",
            f"{found['hard_tokens']:,} of them are hard ({found['hard_ratio']:.1%}): "
            "their confidence under phase 1 is below the threshold",
            f"{'':<34}{'phase 1 alone':>16}{'phases 1 and 2':>16}",
            *lines,
            "Phase 2 trains the output head that both exits share, so the predictions at the exit of phase 1 change",
            "too: the tokens that leave there are not exactly those that were easy for phase 1.",
            f"Full depth without exits ({config['num_layers']} layers, one head) costs "
            f"{summary['full_depth_flops_per_token']:,.0f} FLOPs per token. At this",
            f"vocabulary size one head costs as much as {layers:.1f} layers, and a token that continues past the exit",
            "needs two heads: compare FLOPs per token, not compute cost. The script does not continue phase 1 with",
            "the training FLOPs of phase 2, so it does not show which of the two is the better use of them.",
        ]
    )


def conclusion(summary: Mapping[str, Any]) -> str:
    """The meaning of the held-out figures next to the in-sample ones, in words."""
    seen, new = summary["in_sample"], summary["held_out"]
    hard = [seen["phase_1"]["hard_ppl"], seen["final"]["hard_ppl_as_trained"]]
    hard += [new["phase_1"]["hard_ppl"], new["final"]["hard_ppl"]]
    before, after = new["phase_1"]["ppl"], new["final"]["ppl"]
    change = after / before - 1
    if abs(change) < EVEN:
        verdict = "phase 2 makes no difference on new text (less than 1%, which one random seed cannot resolve)"
    else:
        verdict = f"on new text phase 2 makes the model {'better' if change < 0 else 'worse'}"
    text = (
        f"Conclusion. In-sample, phase 2 changes the perplexity of the hard tokens from {hard[0]:,.1f} to "
        f"{hard[1]:,.1f}; it was trained on exactly these tokens, so this measures how well it fits them. Held-out, on "
        f"test tokens that no training used, the perplexity of hard tokens goes from {hard[2]:,.1f} to {hard[3]:,.1f} "
        f"and that of all tokens from {before:,.1f} to {after:,.1f}: {verdict}. "
        "Only the held-out figures predict the quality on new text."
    )
    return textwrap.fill(text, 79)


def prepare(out: Path, overwrite: bool) -> None:
    """Creates the output folder, before the run starts."""
    if out.exists() and not (overwrite and out.is_dir()):
        fix = "choose another --out, or give --overwrite" if out.is_dir() else "it is a file: choose another --out"
        raise EaseError(f"{out} exists already: {fix}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EaseError(f"cannot create the folder {out} ({error.strerror}): choose another --out") from error


def save(summary: Mapping[str, Any], out: Path) -> Path:
    """Writes out/summary.json atomically: the file is complete or absent."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN

    path, part = out / "summary.json", out / "summary.json.part"
    try:
        part.write_text(json.dumps(plain(summary), indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def run(settings: Settings, out: str | Path = "runs/colab2", overwrite: bool = False) -> dict[str, Any]:
    """Runs the experiment and writes out/summary.json; refuses an existing folder unless `overwrite`."""
    folder, status = Path(out), Status()
    prepare(folder, overwrite)
    try:
        summary = experiment(settings, status)
        save(summary, folder)
    finally:
        status.clear()
        with suppress(OSError):
            folder.rmdir()  # removes the folder if a failed run left it empty: it would block the next run
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(prog="colab2.py", description="The original ASHEM experiment.")
    add, default = parser.add_argument, Settings()
    add("--data", metavar="DIR", help="folder with train.txt, valid.txt, test.txt (default: WikiText-2 from the hub)")
    add("--out", metavar="DIR", default="runs/colab2", help="new folder for summary.json (default: %(default)s)")
    add("--overwrite", action="store_true", help="write to --out even if it exists")
    for name, text in [
        ("num_samples", "training samples of seq_len + 1 words"),
        ("seq_len", "tokens in a sequence"),
        ("batch_size", "sequences in a batch"),
        ("dim", "width of the model"),
        ("num_heads", "attention heads"),
        ("max_epochs", "maximum number of epochs of each phase"),
        ("seed", "random seed of weights and batch order"),
    ]:
        add(
            f"--{name.replace('_', '-')}",
            type=int,
            metavar="N",
            default=getattr(default, name),
            help=f"{text} (default: %(default)s)",
        )
    options = vars(parser.parse_args(argv))
    out, overwrite = options.pop("out"), options.pop("overwrite")
    try:
        summary = run(Settings(**options), out, overwrite)
    except EaseError as error:
        print(f"colab2.py: {error}", file=sys.stderr)
        return 2
    print(f"\n{in_sample_table(summary)}\n\n{held_out_table(summary)}\n\n{conclusion(summary)}\n")
    print(f"Written to {Path(out) / 'summary.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
