"""Time and memory of a training step, compared with transformers and with a training loop that holds all logits.

    python benchmarks/training.py [--out results/training.json] [--repeats 15] [--only step] [--markdown]

Calls are interleaved (A B A B ...) in one process and compared by ratio: the median over rounds, and the range. Rounds
are repeated until the median is known to about 1% or five times `--repeats` are done. With one thread times are CPU
time, user and system, which other work on the machine disturbs least; with more, wall-clock. Nothing here passes or
fails; every ratio is shown with a target. Token ids are random, weights as initialised, everything in float32 on the
CPU, and every training step includes clipping and AdamW.

Part of the cost of large logits is not arithmetic: glibc returns blocks over 32 MiB to the system at once and gets them
back page by page in the next step. To compare without that effect:

    MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_MMAP_THRESHOLD_=8000000000 python benchmarks/training.py --only step
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ease.evaluation.scoring import score
from ease.interface import Batch
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.trainer import Trainer
from ease.training.config import StageConfig, TrainingConfig, create_deep_supervision_config, create_standard_config
from ease.training.engine import GRAD_CLIP
from ease.training.mining import compute_confidence_threshold

LR = 1e-4


@dataclass(frozen=True)
class Shape:
    """The size of a model and of its batches."""

    name: str
    vocab: int
    dim: int
    layers: int
    heads: int
    seq: int
    batch: int

    def model(self) -> StandardTransformer:
        torch.manual_seed(0)
        return StandardTransformer(self.vocab, self.dim, self.layers, self.heads)

    def batches(self, count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
        """Random (x, y), where y are the following tokens."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.vocab, (count, self.batch, self.seq + 1), generator=generator)
        return [(i[:, :-1].contiguous(), i[:, 1:].contiguous()) for i in ids]

    def __str__(self) -> str:
        return (
            f"({self.name}) vocabulary {self.vocab}, dim {self.dim}, {self.layers} layers, {self.heads} heads, "
            f"sequence {self.seq}, batch {self.batch}"
        )


A = Shape("a", vocab=16_384, dim=64, layers=4, heads=4, seq=32, batch=64)
B = Shape("b", vocab=4_096, dim=256, layers=8, heads=4, seq=256, batch=8)
C = Shape("c", vocab=131_072, dim=128, layers=4, heads=4, seq=128, batch=8)
LONG = replace(B, name="b512", seq=512, batch=4)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    shape: str
    ease: str
    """Time or memory of ease."""
    other: str
    """Time or memory of the implementation that it is compared with."""
    ratio: float
    low: float
    high: float
    target: float
    at_least: bool
    """Whether the target is a lower bound."""

    @property
    def met(self) -> bool:
        return self.ratio >= self.target if self.at_least else self.ratio <= self.target

    def cells(self) -> list[str]:
        bound = f"{'at least' if self.at_least else 'at most'} {self.target:g}"
        ratio = f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"
        return [self.name, self.shape, self.ease, self.other, ratio, bound, "met" if self.met else "missed"]


HEADER = ["comparison", "shape", "ease", "other", "ratio (range)", "target", ""]


# Time -------------------------------------------------------------------------------------------------------------


def interleave(ease: Callable[[], Any], other: Callable[[], Any], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds per call of each, with interleaved calls."""
    ease_times: list[float] = []
    other_times: list[float] = []
    for _ in range(2):  # the first calls allocate memory and choose kernels
        ease(), other()
    while len(ease_times) < repeats or (len(ease_times) < 5 * repeats and uncertainty(ease_times, other_times) > 0.01):
        # The order alternates, so that neither always follows the other.
        pair = [(ease, ease_times), (other, other_times)]
        for call, seconds in pair if len(ease_times) % 2 else pair[::-1]:
            gc.collect()
            start = clock()
            call()
            seconds.append(clock() - start)
    return ease_times, other_times


def clock() -> float:
    """Seconds: of this process's CPU time with one thread, of the wall with more."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def uncertainty(ease_times: list[float], other_times: list[float]) -> float:
    """The relative standard error of the median ratio, from the quartiles as for a normal distribution."""
    ratios = [b / a for a, b in zip(ease_times, other_times)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return 0.93 * (high - low) / middle / len(ratios) ** 0.5


def timed(
    name: str, shape: Shape, target: float, ease: Callable[[], Any], other: Callable[[], Any], repeats: int
) -> Row:
    """The ratio of the time of `other` to that of `ease`."""
    ease_times, other_times = interleave(ease, other, repeats)
    ratios = [b / a for a, b in zip(ease_times, other_times)]
    return Row(
        name,
        shape.name,
        ms(ease_times),
        ms(other_times),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        target,
        True,
    )


def ms(seconds: list[float]) -> str:
    return f"{1000 * statistics.median(seconds):.1f} ms"


def trainer_step(shape: Shape, config: TrainingConfig) -> Callable[[], float]:
    """One step of ease's own training loop."""
    trainer, model, batches = Trainer(config, shape.vocab), shape.model(), shape.batches(1)
    optimizer = trainer.create_optimizer(model, LR)
    return lambda: trainer.train_epoch(model, batches, optimizer)


def minimal_step(model: torch.nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], float]:
    """One step of a minimal training loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    model.train()

    def step() -> float:
        loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        return loss.item()

    return step


def llama_step(shape: Shape) -> Callable[[], float]:
    """The same model and weights as transformers' LlamaForCausalLM, in a minimal training loop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ease_model = shape.model()
    c = ease_model.config
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.dim,
            intermediate_size=c.ffn_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.kv_heads,
            max_position_embeddings=shape.seq,
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=c.tie_embeddings,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
    model.load_state_dict(llama_weights(ease_model))
    ((x, y),) = shape.batches(1)
    labels = x  # transformers shifts labels itself, so each row's last token is not scored
    scored = y.clone()
    scored[:, -1] = -100
    with torch.no_grad():
        llama_loss = model(input_ids=x, labels=labels).loss
        ease_loss = Trainer(create_standard_config(shape.layers), shape.vocab).compute_loss(ease_model, x, scored)
    assert torch.allclose(llama_loss, ease_loss, rtol=1e-4), f"models differ: loss {llama_loss:.4f}, {ease_loss:.4f}"
    return minimal_step(model, lambda: model(input_ids=x, labels=labels).loss)


def llama_weights(model: StandardTransformer) -> dict[str, Tensor]:
    """The weights under transformers' names."""
    names = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.": "self_attn.",
        "ffn.": "mlp.",
    }
    weights = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.exit_norms[-1].weight,
        "lm_head.weight": model.output_head.weight,
    }
    for name, value in model.layers.named_parameters():
        for old, new in names.items():
            name = name.replace(f".{old}", f".{new}")
        weights[f"model.layers.{name}"] = value
    return weights


def all_logits_step(shape: Shape, config: TrainingConfig) -> Callable[[], float]:
    """ease's model in a minimal training loop that holds the logits of every exit with a weight, including weight 0."""
    model, ((x, y),) = shape.model(), shape.batches(1)
    stages = [range(a, b + 1) for a, b in (stage.layers for stage in config.stages or ())]
    weights = {layer: config.weights.get(layer, 0.0) for stage in stages for layer in stage}

    def loss_of() -> Tensor:
        every = model.forward_all_layers(x) if len(weights) > 1 else [model(x)]
        losses = [F.cross_entropy(logits.flatten(0, 1), y.flatten()) for logits in every]
        return sum((w * loss for w, loss in zip(weights.values(), losses)), torch.zeros(()))

    return minimal_step(model, loss_of)


def step(repeats: int) -> Iterator[Row]:
    """1. One training step with the loss on the last layer."""
    for shape, target in ((A, 1.3), (B, 1.1)):
        config = create_standard_config(shape.layers)
        call = trainer_step(shape, config)
        yield timed("step: transformers Llama / ease", shape, target, call, llama_step(shape), repeats)
        call = trainer_step(shape, config)
        yield timed("step: all logits / ease", shape, 1.0, call, all_logits_step(shape, config), repeats)


def path(repeats: int) -> Iterator[Row]:
    """2. Stages with weight 0, whose heads are not computed, against heads computed at every layer."""
    for shape in (A, B):
        stages = [StageConfig((1, shape.layers - 1), 0.0), StageConfig((shape.layers, shape.layers))]
        config = TrainingConfig(stages=stages)
        yield timed(
            "weights 0, ..., 0, 1: every head / ease",
            shape,
            1.084,
            trainer_step(shape, config),
            all_logits_step(shape, config),
            repeats,
        )


def phase_two(repeats: int) -> Iterator[Row]:
    """4. A phase 2 step on half of the tokens, above a frozen trunk of half of the layers."""
    for shape in (A, B):
        trainer, ((x, y),) = Trainer(create_standard_config(shape.layers), shape.vocab), shape.batches(1)
        first = shape.layers // 2 + 1
        active = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        full, grown = shape.model(), shape.model()
        grown.freeze_below(first)
        with torch.no_grad():
            hard = Batch(x, y, active, grown.forward_to_layer(x, first - 1))
        all_tokens = Batch(x, y)
        calls = {}
        for name, model, batch, start in (("hard", grown, hard, first), ("full", full, all_tokens, 1)):
            optimizer = trainer.create_optimizer(model, LR)
            # The loop that `Trainer.run` runs, without the validation that follows it.
            engine = trainer._engine(model, optimizer)
            calls[name] = lambda t=trainer, e=engine, b=batch, s=start: list(t._steps(e, [b], s))
        hard_times, full_times = interleave(calls["hard"], calls["full"], repeats)
        share = flops_of(trainer, grown, hard, first) / flops_of(trainer, full, all_tokens, 1)
        ratios = [a / b / share for a, b in zip(hard_times, full_times)]
        yield Row(
            f"phase 2 step: share of time / share of FLOPs ({share:.1%})",
            shape.name,
            ms(hard_times),
            ms(full_times),
            statistics.median(ratios),
            min(ratios),
            max(ratios),
            1.15,
            False,
        )


def flops_of(trainer: Trainer, model: StandardTransformer, batch: Batch, first: int) -> float:
    scored = batch.x.numel() if batch.active is None else int(batch.active.sum())
    return sum(trainer.step_flops(model, batch, scored, first).values())


def routed(repeats: int) -> Iterator[Row]:
    """5. Routed evaluation with half of the tokens leaving at half of the depth."""
    shape, model = LONG, LONG.model()
    batches, exit = shape.batches(1), shape.layers // 2
    policy = Policy((exit,), (compute_confidence_threshold(model, batches, 0.5, exit=exit),))
    routed_scores, full_scores = score(model, batches, policy), score(model, batches)
    left = (routed_scores.exits == exit).float().mean().item()
    promised = full_scores.flops / routed_scores.flops
    fast, slow = interleave(lambda: score(model, batches, policy), lambda: score(model, batches), repeats)
    ratios = [b / a / promised for a, b in zip(fast, slow)]
    yield Row(
        f"routed evaluation, {left:.0%} leave half-way: speed-up / that of the FLOPs ({promised:.2f})",
        shape.name,
        ms(fast),
        ms(slow),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        0.9,
        True,
    )


# Memory -----------------------------------------------------------------------------------------------------------


def memory(repeats: int) -> Iterator[Row]:
    """3. Peak memory with all layers supervised against the last only, each measured in a process of its own."""
    for shape in (A, B, C):
        peaks = {kind: [child(shape, kind) for _ in range(3)] for kind in ("last", "every", "naive", "naive last")}
        for other, own, bound, target in (("last", "every", False, 1.15), ("naive", "every", True, 1.0)):
            for measure, index in (("above the start", 1), ("whole process", 0)):
                a, b = ([peak[index] for peak in peaks[kind]] for kind in (own, other))
                ratios = [y / x if bound else x / y for x in a for y in b]
                yield Row(
                    f"peak memory, {measure}: "
                    + ("all logits of every layer / ease" if bound else "every layer supervised / last only"),
                    shape.name,
                    f"{statistics.median(a):.0f} MiB",
                    f"{statistics.median(b):.0f} MiB",
                    statistics.median(ratios),
                    min(ratios),
                    max(ratios),
                    target,
                    bound,
                )


def child(shape: Shape, kind: str) -> tuple[float, float]:
    """Peak resident memory of three steps in a new process, in total and above that before the steps, in MiB."""
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--child", shape.name, kind]
    peak, before = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return peak, peak - before


def measure_peak(shape: Shape, kind: str) -> tuple[float, float]:
    """(peak, before) in MiB; before: after imports and creation of model and batch, before the first step."""
    every = create_deep_supervision_config(shape.layers)
    last = create_standard_config(shape.layers)
    call = {
        "last": lambda: trainer_step(shape, last),
        "every": lambda: trainer_step(shape, every),
        "naive": lambda: all_logits_step(shape, every),
        "naive last": lambda: all_logits_step(shape, last),
    }[kind]()
    before = resident("VmRSS")
    for _ in range(3):
        call()
    return resident("VmHWM"), before


def resident(field: str) -> float:
    """A memory field of this process, in MiB. The peak of `getrusage` would include the parent process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")


# The table --------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The machine and the software of the measurement."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((s.split(":")[1].strip() for s in info.read_text().splitlines() if s.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "busy": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def caption(about: dict[str, Any]) -> str:
    malloc = " ".join(f"{name}={value}" for name, value in about["malloc"].items())
    return (
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} thread(s) used, torch {about['torch']}, "
        f"load {about['busy']} at the start, malloc {malloc or 'defaults'}. "
        f"{A}; {B}; {C}; b512: the same with sequence {LONG.seq}, batch {LONG.batch}."
    )


def markdown(rows: list[Row], about: dict[str, Any]) -> str:
    lines = [HEADER, ["---"] * len(HEADER), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{caption(about)}"


def show(rows: list[Row], about: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADER, caption=caption(about))
    for row in rows:
        table.add_row(*row.cells(), style=None if row.met else "bold")
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(table)


COMPARISONS = {"step": step, "path": path, "memory": memory, "phase2": phase_two, "routed": routed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--repeats", type=int, default=15, help="fewest rounds per comparison")
    parser.add_argument("--only", choices=COMPARISONS, action="append", help="this comparison; may be repeated")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        name, kind = options.child
        print(json.dumps(measure_peak({"a": A, "b": B, "c": C}[name], kind)))
        return
    about, rows = machine(), []
    for name in options.only or COMPARISONS:
        for row in COMPARISONS[name](max(2, options.repeats)):
            print(" | ".join(row.cells()), file=sys.stderr, flush=True)
            rows.append(row)
    if options.markdown:
        print(markdown(rows, about))
    else:
        show(rows, about)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        results = {"machine": about, "rows": [vars(row) | {"met": row.met} for row in rows]}
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
