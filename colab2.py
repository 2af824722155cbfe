"""The ASHEM experiment: a small model learns first, and new layers then learn from the tokens it is unsure of.

    python colab2.py                                    # WikiText-2 from the Hugging Face hub
    python colab2.py --data path/to/wikitext-2   # a folder with train.txt, valid.txt and test.txt

The recipe and its sizes are the seed's. Two kinds of figures come out, and they must not be mixed up:

- in-sample: the seed mines hard tokens among the validation tokens, trains phase 2 on them, stops by them and
  scores on them. This says how well those tokens can be fitted, and nothing about new text.
- held-out: the finished model, with the same threshold, on the test split that no choice has seen.

Needs torch, numpy and, without --data, `datasets`; nothing has to be installed from here. Everything is the
package's own: this file builds the recipe, and shows and saves what comes out.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))

import argparse
import copy
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

import ease
from ease import ASHEMConfig, Data, EaseError, Phase, StandardTransformer, TokenBatches, Trainer, score
from ease.flops import full_depth_flops
from ease.trainer import Watch
from experiments.utils import create_wikitext_dataloaders, get_device, load_wikitext_words, set_seed

IN_SAMPLE = "validation tokens: phase 1 is stopped by them; phase 2 is mined from, trained on and stopped by them"
HELD_OUT = "test tokens: used for no choice, scored once with the finished model and the threshold mined above"


@dataclass(frozen=True)
class Settings:
    """One run; the defaults are the seed's experiment."""

    data: str | None = None
    """A folder with train.txt, valid.txt and test.txt; None reads WikiText-2 from the hub."""
    num_samples: int = 10_000
    """Training samples of seq_len + 1 words; validation gets a fifth of that."""
    seq_len: int = 32
    """Tokens in a sequence."""
    batch_size: int = 64
    """Sequences in a batch."""
    dim: int = 64
    """Width of the model."""
    num_heads: int = 4
    """Attention heads."""
    max_epochs: int = 100
    """At most that many epochs in each phase; both usually end earlier, by themselves."""
    seed: int = 42
    """Of the weights and of the order of the batches."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise EaseError(f"seed must lie in 0..{2**32 - 1}, got {self.seed}")

    def ashem(self) -> ASHEMConfig:
        return ASHEMConfig(
            protocol="seed",
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
        # The head has its own weights: the seed's phase 2 trains the head along, and a tied one would move the
        # embedding with it, and thereby the very states that the hard tokens were stored with.
        return StandardTransformer(
            vocab_size, self.dim, self.ashem().num_layers, self.num_heads, dropout=0.1, tie_embeddings=False
        )


class Lines(Watch):
    """Says what is going on, a line per epoch."""

    def __init__(self, phase: Phase, mined: Sequence[Mapping[str, Any]]) -> None:
        self.name = phase.name
        layers = f"layers {phase.first} to {max(phase.config.weights)}"
        print(f"\n{self.name}: {layers}, learning rate {phase.options.lr:g}, patience {phase.options.patience}")
        for found in mined:
            print(
                f"in-sample threshold {found['threshold']:.4f}: {found['count']:,} of {found['of']:,} tokens "
                f"are hard ({found['count'] / found['of']:.1%})"
            )

    def epoch(self, row: Mapping[str, float]) -> None:
        print(
            f"in-sample {self.name}, epoch {row['epoch']:2.0f}: PPL {row['val_ppl']:.2f}, acc {row['val_acc']:.2%}"
            f"   (training loss {row['train_loss']:.4f}, {row['seconds']:.0f} s)",
            flush=True,
        )


def experiment(settings: Settings) -> dict[str, Any]:
    """Both phases and all figures; prints a line per epoch and returns what summary.json holds."""
    device, ashem = get_device(), settings.ashem()
    train, val, vocab_size = create_wikitext_dataloaders(
        settings.num_samples, settings.batch_size, settings.seq_len, settings.seed, settings.data
    )
    words, _ = load_wikitext_words(settings.data)
    test = TokenBatches(words["test"], settings.seq_len, settings.batch_size, drop_last=False)
    set_seed(settings.seed)
    model, strategy = settings.model(vocab_size), ashem.strategy()
    name = "WikiText-2 (hub)" if settings.data is None else Path(settings.data).name
    print(f"ASHEM by the seed's protocol on {name}, {vocab_size:,} words, {device.type}, seed {settings.seed}")
    print(f"in-sample figures are on {IN_SAMPLE}")

    phases = ease.train(
        model, strategy, Data(train, val), device=device, watch=lambda phase: Lines(phase, strategy.mined)
    )
    done = [next(phases)]
    shallow = copy.deepcopy(model)  # phase 1's final model, which fixes the hard tokens of every split
    done += phases
    final_phase = done[-1][0]
    threshold = strategy.mined[0]["threshold"]

    def figures(batches: TokenBatches) -> dict[str, Any]:
        """Phase 1 alone and the final model, routed, on the same hard tokens."""
        alone, routed = score(shallow, batches), score(model, batches, strategy.policy())
        hard = alone.confidences < threshold
        count = int(hard.sum())
        return {
            "tokens": len(hard),
            "hard_tokens": count,
            "hard_ratio": count / len(hard),
            # Seen from the final model, every token leaves at phase 1's exit.
            "phase_1": alone.figures(hard, depth=ashem.phase2_layers) | {"shallow_ratio": 1.0},
            "final": routed.figures(hard),
        }

    in_sample, held_out = figures(val), figures(test)
    before, after = in_sample["phase_1"]["hard_ppl"], hard_ppl_as_trained(model, final_phase, device)
    in_sample["threshold"] = threshold
    in_sample["hard_tokens_mined"] = strategy.mined[0]["count"]
    in_sample["final"] |= {"hard_ppl_as_trained": after, "improvement": before - after}
    return {
        "experiment": "ASHEM by the seed's protocol",
        "ease": ease.__version__,
        "data": {"name": name, "vocab_size": vocab_size},
        "settings": asdict(settings) | {"data": name},
        "ashem": asdict(ashem),
        "model": asdict(model.config),
        "full_depth_flops_per_token": full_depth_flops(model.config, settings.seq_len),
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
    """Perplexity of the hard tokens as the phase trains on them: each alone, from its stored state, unrouted."""
    trainer, loss, tokens = Trainer(phase.config, model.config.vocab_size, device), 0.0, 0
    model.eval()
    for batch in phase.train:
        mean = trainer.compute_loss(model, batch.x, batch.y, state=batch.state, first=phase.first)
        loss, tokens = loss + mean.item() * batch.y.numel(), tokens + batch.y.numel()
    return math.exp(loss / tokens)


def in_sample_table(summary: Mapping[str, Any]) -> str:
    """The seed's lines, each marked as in-sample."""
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
        ("hard PPL after", f"{final['hard_ppl_as_trained']:.2f}", "as trained: each token alone, from its state"),
        ("improvement", gain(final["hard_ppl_as_trained"]), ""),
        ("hard PPL after, routed", f"{final['hard_ppl']:.2f}", "the same tokens in the routed run"),
        ("improvement, routed", gain(final["hard_ppl"]), ""),
        ("shallow ratio", f"{final['shallow_ratio']:.1%}", "tokens that leave at phase 1's exit"),
        ("compute cost", f"{final['compute_cost']:.1%}", "layers run; heads are not in this figure"),
    ]
    lines = [f"in-sample {name:<24}{value:>16}   {note}".rstrip() for name, value, note in rows]
    return "\n".join([f"in-sample, on {IN_SAMPLE}", *lines])


def held_out_table(summary: Mapping[str, Any]) -> str:
    """Phase 1 alone and the final model on the test split, and what the figures leave out."""
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
            "phase 1 is less sure of them than the threshold",
            f"{'':<34}{'phase 1 alone':>16}{'phases 1 and 2':>16}",
            *lines,
            "Phase 2 trains the head that both exits share, so phase 1's exit changes too: the tokens that leave need",
            "not be those that were easy for phase 1.",
            f"All {config['num_layers']} layers and one head, without exits, take "
            f"{summary['full_depth_flops_per_token']:,.0f} FLOPs per token. At this vocabulary a head",
            f"costs as much as {layers:.1f} layers, and a token that does not leave pays for two: "
            "look at the FLOPs, not at",
            "the compute cost. What phase 1 gains when it trains on for phase 2's FLOPs is not measured here.",
        ]
    )


def prepare(out: Path, overwrite: bool) -> None:
    """Makes the folder, before any work is done for it."""
    if out.exists() and not (overwrite and out.is_dir()):
        fix = "choose another --out, or give --overwrite" if out.is_dir() else "it is a file: choose another --out"
        raise EaseError(f"{out} exists already: {fix}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EaseError(f"cannot make the folder {out} ({error.strerror}): choose another --out") from error


def save(summary: Mapping[str, Any], out: Path) -> Path:
    """Writes out/summary.json in one move, so that it is there whole or not at all."""

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
    """The experiment with its folder: refuses one that exists, and leaves summary.json in it."""
    folder = Path(out)
    prepare(folder, overwrite)
    try:
        summary = experiment(settings)
        save(summary, folder)
    finally:
        with suppress(OSError):
            folder.rmdir()  # succeeds only where a failed run left it empty, and would bar the next one
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="colab2.py", description="The ASHEM experiment by the seed's protocol.")
    add, default = parser.add_argument, Settings()
    add("--data", metavar="DIR", help="folder with train.txt, valid.txt, test.txt (default: WikiText-2 from the hub)")
    add("--out", metavar="DIR", default="runs/colab2", help="new folder for summary.json (default: %(default)s)")
    add("--overwrite", action="store_true", help="write into --out even if it exists")
    for name, text in [
        ("num_samples", "training samples of seq_len + 1 words"),
        ("seq_len", "tokens in a sequence"),
        ("batch_size", "sequences in a batch"),
        ("dim", "width of the model"),
        ("num_heads", "attention heads"),
        ("max_epochs", "limit for each phase"),
        ("seed", "of weights and order"),
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
    print(f"\n{in_sample_table(summary)}\n\n{held_out_table(summary)}\n\nWritten to {Path(out) / 'summary.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
