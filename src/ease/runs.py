"""A run: one recipe from data to report, with the lines that its gain has to be shown beside.

The strategy's phases come first. Then, at the same training FLOPs and on the same data, the lines to compare with:
phase 1 trained on, a plain model of full depth, deep supervision with the same exits. All are scored on the test
split once, and the hard tokens are those of phase 1's final model.
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch

import ease
from ease.calibration import Sequences, Target, auroc
from ease.checkpoint import load_model, run_folder, save_calibration, save_model, write_json
from ease.data import EOS, Corpus, TokenBatches, load_corpus, load_tokenizer, token_strings
from ease.errors import EaseError
from ease.evaluation import Scores, perplexity, score
from ease.exits import Policy, route
from ease.flops import head_flops, layer_flops
from ease.mining import Quantile
from ease.models import StandardTransformer
from ease.report import UNROUTED, write_report
from ease.trainer import Data, History, Phase, PhaseOptions, Strategy, Trainer, TrainingConfig, Watch, Watched, train

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Baseline = Literal["full-depth", "continued", "standard", "deep-supervision"]
SWEEP = (1.0, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2, 0.1, 0.0)  # shares of tokens that leave at each exit
EXPLORER_TOKENS = 384
MATCH = 3  # likeliest tokens that the explorer shows


@dataclass(frozen=True)
class ShapeConfig:
    """The shape of the model; its depth is the strategy's, its vocabulary the tokenizer's."""

    dim: int = 128
    """Width of the state."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads (as many as query heads by default)."""
    hidden_dim: int | None = None
    """Gated units of the feed-forward (8/3 of dim by default)."""
    dropout: float = 0.0
    """Share of a branch's outputs zeroed in training."""
    tie_embeddings: bool = False
    """Use the embedding as the output head."""


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is cut."""

    source: str = "stdlib"
    """stdlib, a folder with train.txt and valid.txt, a text file, wikitext-2, wikitext-103 or hf:NAME/CONFIG."""
    tokenizer: str = "bpe:2048"
    """bpe:N, word or byte."""
    seq_len: int = 128
    """Tokens in a sequence."""
    batch_size: int = 32
    """Sequences in a batch."""
    max_tokens: int | None = None
    """Read at most that many training tokens."""
    epoch_batches: int | None = None
    """Batches between validations (all of them by default)."""
    eval_batches: int | None = None
    """Score at most that many batches of validation and of test."""


class StrategyConfig(Protocol):
    """What `ease.STRATEGIES` lists: a dataclass that knows the depth to start with and makes its strategy."""

    @property
    def num_layers(self) -> int | None: ...  # None: it starts from a finished model
    def strategy(self) -> Strategy: ...


S = TypeVar("S", bound=StrategyConfig, covariant=True)


@dataclass(frozen=True)
class RunConfig(Generic[S]):
    """Everything that a run depends on."""

    strategy: S
    """The plan that yields phases."""
    name: str = "run"
    """Shown in the report; the run's folder is runs/NAME unless --out says otherwise."""
    model: ShapeConfig = field(default_factory=ShapeConfig)
    """Shape of the model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text, tokenizer and batches."""
    compare: tuple[Baseline, ...] = ("continued", "standard", "deep-supervision")
    """Lines beside it: the same model without routing, and others trained for the same FLOPs."""
    seed: int = 0
    """Of weights, order and dropout."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    start: str | None = None
    """A finished model to start from: the folder of a run, or a checkpoint's folder or name on the Hugging Face hub. It
    brings its shape and its tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights of a checkpoint that is started from."""
    note: str = ""
    """Said in the report: how to take these figures."""


class Line(NamedTuple):
    """One trained model with its policy, and what training it took in all."""

    name: str
    model: StandardTransformer
    policy: Policy
    curve: list[dict[str, Any]]
    flops: Mapping[str, float]
    seconds: float

    @property
    def total(self) -> float:
        return sum(self.flops.values())

    def then(self, name: str, phase: Phase, history: History, model: StandardTransformer) -> Line:
        """The line that goes on from this one by one phase."""
        rows = [
            {
                **row,
                "phase": phase.name,
                "flops": row["flops"] + self.total,
                "seconds": row["seconds"] + self.seconds,
            }
            for row in history.rows
        ]
        flops = {k: self.flops.get(k, 0.0) + history.flops.get(k, 0.0) for k in {**self.flops, **history.flops}}
        return Line(name, model, phase.config.policy, self.curve + rows, flops, self.seconds + history.seconds)


class Recorder(Watch):
    """Writes every epoch to metrics.jsonl as it ends, and passes it on."""

    def __init__(self, path: Path, line: str, inner: Watch) -> None:
        self.path, self.line, self.inner = path, line, inner

    def step(self, progress: float, loss: float = math.nan) -> None:
        self.inner.step(progress, loss)

    def epoch(self, row: Mapping[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"line": self.line, **row}) + "\n")
        self.inner.epoch(row)


@dataclass
class Workshop:
    """What the parts of a run share."""

    config: RunConfig[Any]
    folder: Path
    corpus: Corpus
    device: str
    watch: Callable[[str], Watch]
    start: StandardTransformer | None = None

    @property
    def in_sample(self) -> bool:
        """Whether the strategy validates on tokens that it trains on."""
        return getattr(self.config.strategy, "protocol", None) == "seed"

    def watching(self, line: str, label: str | None = None) -> Watch:
        return Recorder(self.folder / "metrics.jsonl", line, self.watch(label or line))

    def batches(self, split: str) -> TokenBatches:
        data = self.config.data
        ids = getattr(self.corpus, split)
        if split == "train":
            return TokenBatches(
                ids,
                data.seq_len,
                data.batch_size,
                shuffle=True,
                seed=self.config.seed,
                max_batches=data.epoch_batches,
            )
        return TokenBatches(ids, data.seq_len, data.batch_size, max_batches=data.eval_batches)

    def new_model(self, num_layers: int) -> StandardTransformer:
        torch.manual_seed(self.config.seed)
        if self.start is None:
            shape = {"vocab_size": self.corpus.vocab_size, **asdict(self.config.model)}
        else:
            shape = asdict(replace(self.start.config, adapter_exits=(), adapter_dim=0))
        return StandardTransformer(**{**shape, "num_layers": num_layers}).to(self.device)

    def strategy_lines(self) -> tuple[list[Line], list[Phase], Strategy]:
        """A line per phase of the strategy, the phases, and the strategy as it ended."""
        depth = self.config.strategy.num_layers
        if self.start is None and depth is None:
            raise EaseError("this strategy needs a finished model: name a checkpoint with --start")
        if self.start is None and getattr(self.config.strategy, "pretrained", False):
            raise EaseError("pretrained says that phase 1 is finished: name its model with --start")
        model = self.start.to(self.device) if self.start is not None else self.new_model(depth or 0)
        model.policy_options = {}  # the strategy's policy is what counts from here
        torch.manual_seed(self.config.seed)
        strategy, data = self.config.strategy.strategy(), Data(self.batches("train"), self.batches("val"), self.watch)
        line = Line("start", model, Policy(), [], {}, 0.0)
        lines: list[Line] = []
        if self.start is not None:
            line = line._replace(name="as it came")
            lines.append(line._replace(model=copy.deepcopy(model)))
        phases: list[Phase] = []
        suffix = ", in-sample" if self.in_sample else ""
        watch = lambda phase: self.watching(phase.name, phase.name + suffix)  # noqa: E731
        for phase, history in train(model, strategy, data, device=self.device, watch=watch):
            line = line.then(phase.name, phase, history, copy.deepcopy(model))
            lines.append(line)
            phases.append(phase)
        lines[-1] = line._replace(policy=strategy.policy())  # which may have been found when all was trained
        return lines, phases, strategy

    def base(self, lines: list[Line], phases: list[Phase]) -> tuple[Line, TrainingConfig]:
        """What the first later phase built on, phase 1 or the model as it came, and the loss it learned with."""
        came = len(lines) - len(phases)
        at = next((i for i, phase in enumerate(phases) if phase.first > 1), 1 - came) - 1 + came
        own = phases[at - came].config if at >= came else ease.create_standard_config(lines[at].model.num_layers)
        return lines[at], own

    def baselines(self, lines: list[Line], phases: list[Phase]) -> Iterator[Line]:
        """The lines to compare with, at the training FLOPs of the strategy's last line."""
        final, options = lines[-1], phases[0].options
        if "full-depth" in self.config.compare and final.policy.exits:
            yield final._replace(name=f"{final.name}{UNROUTED}", policy=Policy())
        depth, start = final.model.num_layers, Line("start", final.model, Policy(), [], {}, 0.0)
        if "continued" in self.config.compare and len(lines) > 1:
            base, config = self.base(lines, phases)
            train_batches = self.batches("train")
            train_batches.epoch = len(base.curve)
            name, model = f"{base.name} continued", copy.deepcopy(base.model)
            yield self.trained_on(name, base, model, config, options, final.total, train_batches)
        plans = {
            "standard": ease.create_standard_config(depth),
            "deep-supervision": ease.create_deep_supervision_config(depth),
        }
        for name, config in plans.items():
            own = phases[0].config
            same = len(lines) == 1 and config.weights == own.weights and not (own.layer_lr_scales or own.going_on)
            if same or name not in self.config.compare:
                continue
            line = self.trained_on(
                f"{name}, {depth} layers",
                start,
                self.new_model(depth),
                config,
                options,
                final.total,
                self.batches("train"),
            )
            if name == "deep-supervision" and final.policy.exits:
                # The same exits, and as many tokens sent on from each as the strategy sends (on validation).
                val = self.batches("val")
                thresholds = matched(line.model, val, final.policy.exits, score(final.model, val, final.policy))
                line = line._replace(policy=Policy(final.policy.exits, thresholds))
            yield line

    def trained_on(
        self,
        name: str,
        before: Line,
        model: StandardTransformer,
        config: TrainingConfig,
        options: PhaseOptions,
        flops: float,
        train_batches: TokenBatches,
    ) -> Line:
        """One more phase on all tokens, up to `flops` in all."""
        endless = replace(options, patience=None, max_epochs=10**6, max_flops=flops - before.total)
        phase = Phase(name, config, train_batches, self.batches("val"), endless)
        torch.manual_seed(self.config.seed)
        trainer = Trainer(config, model.config.outputs, self.device)
        return before.then(name, phase, trainer.run(model, phase, self.watching(name)), model)


def run(
    config: RunConfig[Any],
    out: Path,
    *,
    overwrite: bool = False,
    watch: Callable[[str], Watch] = lambda line: Watch(),
) -> dict[str, Any]:
    """Executes a run and writes its folder; returns the summary.

    Args:
        out: the run's folder; it appears when all is done.
        watch: makes, from the name of a line, what is told of its steps and epochs.
    """
    device = choose_device(config.device)
    if config.start is not None and Path(config.start).exists() and Path(config.start).resolve() == out.resolve():
        raise EaseError(f"{out} is the model to start from: choose another --out")
    with run_folder(out, overwrite) as folder:
        data = config.data
        start, tokenizer, eos = load_start(config.start, config.dtype) if config.start else (None, data.tokenizer, None)
        corpus = load_corpus(data.source, tokenizer, eos=eos, max_tokens=data.max_tokens)
        shop = Workshop(config, folder, corpus, device, watch, start)
        shop.batches("test")  # too short a text should be told before training, not after
        lines, phases, strategy = shop.strategy_lines()
        final, (base, _) = lines[-1], shop.base(lines, phases)
        lines += shop.baselines(lines, phases)

        summary = describe(config, corpus, final.model, shop.device)
        summary |= figures(shop, lines, base, final, strategy)
        local = Path(data.source).exists()
        source: dict[str, Any] = {"source": str(Path(data.source).resolve()) if local else data.source}
        source |= {"hash": corpus.hash, "given": start is not None, "eos": eos}
        save_model(folder, final.model, final.policy, ease_version=ease.__version__, run=summary["config"], data=source)
        corpus.tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "summary.json", summary)
        write_json(folder / "explorer.json", explorer(final, corpus, shop.batches("test"), summary["sweep"]["points"]))
        write_report([folder], folder / "report.html")
    return summary


def load_start(name: str, dtype: str = "float32") -> tuple[StandardTransformer, Tokenizer, int | None]:
    """The model to start from, its tokenizer, and the id that ends a text."""
    folder = Path(name)
    if (folder / "summary.json").is_file():
        model, config = load_model(folder)
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        data = config["data"]
        return model, tokenizer, data["eos"] if data.get("given") else tokenizer.token_to_id(EOS)
    from ease import hf

    return hf.from_pretrained(name, dtype=getattr(torch, dtype)), hf.load_tokenizer(name), hf.end_of_text(name)


def describe(config: RunConfig[Any], corpus: Corpus, model: StandardTransformer, device: str) -> dict[str, Any]:
    """What was run, on what, where: the part of a summary that no figure is in."""
    data = config.data
    kind = type(config.strategy)
    name = next((n for n, listed in ease.STRATEGIES.items() if kind is listed), kind.__name__)
    return {
        "format": 1,
        "ease_version": ease.__version__,
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


def figures(shop: Workshop, lines: list[Line], base: Line, final: Line, strategy: Strategy) -> dict[str, Any]:
    """Everything measured: each line, the hard set as `base` fixes it, the sweep, reliability."""
    val, test, depth = shop.batches("val"), shop.batches("test"), final.model.num_layers
    mined = getattr(strategy, "mined", [])
    hard: dict[str, Any] = {}
    hard_summary = None
    if mined:
        threshold = mined[0]["threshold"]
        for split, batches in (("val", val), ("test", test)):
            hard[split] = score(base.model, batches).confidences < threshold
        hard_summary = {
            "exits": [final.policy.exits[0]],
            "thresholds": [threshold],
            "train_ratio": mined[0]["count"] / mined[0]["of"],
            "train_count": mined[0]["count"],
            "test_ratio": hard["test"].float().mean().item(),
            "fixed_by": f"{base.name}'s final model",
        }
    rows: list[dict[str, Any]] = []
    scoring = shop.watch("scoring")
    for number, line in enumerate(lines, 1):
        scoring.step(number / (len(lines) + 1))
        exits = sorted({*(line.policy.exits or final.policy.exits), line.model.num_layers})
        exits = [e for e in exits if e <= line.model.num_layers and e in line.model.trained_exits]
        rows.append(
            {
                "name": line.name,
                "num_layers": line.model.num_layers,
                "train_flops": line.total,
                "train_seconds": line.seconds,
                "flops_by": dict(line.flops),
                "curve": line.curve,
                "policy": asdict(line.policy) if line.policy.exits else None,
                "val": score(line.model, val, line.policy).figures(hard.get("val"), depth),
                "test": score(line.model, test, line.policy).figures(hard.get("test"), depth),
                "exit_quality": {
                    str(e): {k: v for k, v in score(line.model, test, last=e).figures().items() if k in ("ppl", "acc")}
                    for e in exits
                },
            }
        )
    leaving = final.policy.exits
    points = []
    if leaving:
        confidences = {e: score(final.model, val, last=e).confidences for e in leaving}
        for share in SWEEP:
            policy = Policy(leaving, tuple(sending(confidences[e], 1 - share) for e in leaving))
            point = score(final.model, test, policy).figures(hard.get("test"), depth)
            points.append({"thresholds": list(policy.thresholds), **point})
    scoring.step(1.0)
    seen = Sequences(final.model, test, final.policy)
    in_sample = None
    if shop.in_sample:
        before = next(row["val"]["hard_ppl"] for row in rows if row["name"] == base.name)
        after = next(row["val"] for row in rows if row["name"] == final.name)
        in_sample = {
            "split": "validation",
            "hard_ppl_before": before,
            "hard_ppl_after": after["hard_ppl"],
            "improvement": 1 - after["hard_ppl"] / before,
            **{k: after[k] for k in ("ppl", "acc", "shallow_ratio", "compute_cost")},
        }
    return {
        "lines": rows,
        "hard": hard_summary,
        "in_sample": in_sample,
        "sweep": {"line": final.name, "split": "test", "points": points},
        "reliability": {
            "split": "test",
            "exits": [
                {
                    "layer": e,
                    **score(final.model, test, last=e).reliability(),
                    "auroc": auroc(*seen.view(e)) if e in leaving else None,
                }
                for e in (*leaving, final.model.num_layers)
            ],
        },
    }


def sending(confidences: Any, share: float) -> float:
    """The threshold that sends a share of tokens on: next to 0 where none shall go, 1 where all shall."""
    if share <= 0:
        return 1e-9
    quantile = Quantile()
    quantile.add(confidences)
    return quantile(share) if share < 1 else 1.0


def matched(model: StandardTransformer, val: TokenBatches, exits: tuple[int, ...], like: Scores) -> tuple[float, ...]:
    """Thresholds under which as many tokens pass each exit as in `like`, exit by exit."""
    thresholds: tuple[float, ...] = ()
    for exit in exits:
        going = float((like.exits > exit).float().mean())
        so_far = score(model, val, Policy(exits[: len(thresholds)], thresholds), last=exit)
        arrived = so_far.confidences[so_far.exits == exit]
        share = going * len(so_far.exits) / max(1, len(arrived))
        thresholds = (*thresholds, max(1e-9, sending(arrived, min(1.0, share))))
    return thresholds


@torch.no_grad()
def explorer(line: Line, corpus: Corpus, test: TokenBatches, points: list[dict[str, Any]]) -> dict[str, Any]:
    """Routed runs over a few held-out sequences, token by token."""
    model = line.model.eval()
    device = next(model.parameters()).device
    rows = max(1, min(EXPLORER_TOKENS // test.seq_len, len(test.windows)))
    windows = test.windows[:rows].long().to(device)
    x, y = windows[:, :-1], windows[:, 1:]
    runs = []
    for point in points or [{"thresholds": []}]:
        policy = Policy(line.policy.exits, tuple(point["thresholds"]))
        routed = route(model, x, policy.exits, policy.thresholds or 0.0)
        top = routed.logits.softmax(-1).topk(MATCH)
        losses = torch.nn.functional.cross_entropy(routed.logits.flatten(0, 1), y.flatten(), reduction="none").cpu()
        scored = score(model, [(x, y)], policy).figures()
        texts = corpus.tokenizer.decode_batch([[i] for i in top.indices.flatten().tolist()], skip_special_tokens=False)
        chances = [round(p, 4) for p in top.values.flatten().tolist()]
        pairs = list(zip(texts, chances, strict=True))
        runs.append(
            {
                "thresholds": list(policy.thresholds),
                "exits": routed.exits.flatten().tolist(),
                "confidences": [round(c, 4) for c in routed.confidences.flatten().tolist()],
                "top": [pairs[i : i + MATCH] for i in range(0, len(pairs), MATCH)],
                "totals": {
                    **{k: scored[k] for k in ("exit_shares", "compute_cost", "flops_per_token", "acc")},
                    "ppl": perplexity(losses),
                },
            }
        )
    tokens = token_strings(corpus.tokenizer, x.flatten().tolist())
    return {"split": "test", "tokens": tokens, "exits": [*line.policy.exits, model.num_layers], "runs": runs}


def open_run(folder: Path) -> tuple[StandardTransformer, dict[str, Any], Corpus, DataConfig]:
    """The model of a run with its configuration, and the text it was made from."""
    model, config = load_model(folder)
    model.to(choose_device("auto"))
    try:
        data = DataConfig(**config["run"]["data"])
        corpus_hash, source = config["data"]["hash"], config["data"]["source"]
    except (KeyError, TypeError) as error:
        raise EaseError(f"{folder} does not say what data it was made from ({error}): run again") from error
    given = load_tokenizer(folder / "tokenizer.json") if config["data"].get("given") else data.tokenizer
    corpus = load_corpus(source, given, eos=config["data"].get("eos"), max_tokens=data.max_tokens)
    if corpus.hash != corpus_hash:
        raise EaseError(f"the text of {corpus.name} is not what {folder} was trained on: restore it, or run again")
    return model, config, corpus, data


def halves(test: torch.Tensor, data: DataConfig) -> tuple[list[Any], list[Any]]:
    """Batches of a test split, its sequences drawn into two halves: to calibrate on, and to measure the outcome on.

    Drawn, and not cut in the middle: a bound on the mean over all sequences then holds by the draw, however unlike the
    texts are.
    """
    most = data.eval_batches and 2 * data.eval_batches
    drawn = list(TokenBatches(test, data.seq_len, data.batch_size, shuffle=True, max_batches=most))
    if len(drawn) < 2:
        raise EaseError("the test split fills one batch, and calibration needs two: run again with more text")
    return drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]


def calibrate(folder: Path, target: Target, watch: Callable[[str], Watch] = lambda name: Watch()) -> dict[str, Any]:
    """Chooses thresholds for a run's exits and makes them its policy; returns what its policy.json then holds.

    Validation, which training has stopped by, only proposes. One half of the test split decides, and the figures are
    those of the other half.
    """
    model, _, corpus, data = open_run(folder)
    exits = Policy.own(model).exits or tuple(sorted(model.trained_exits)[:-1])
    if not exits:
        raise EaseError(f"{folder} has no exits to calibrate: tune it first (ease tune), or use a strategy that has")
    policy = replace(Policy.own(model), exits=exits, thresholds=(1.0,) * len(exits))
    val = TokenBatches(corpus.val, data.seq_len, data.batch_size, max_batches=data.eval_batches)
    found = ease.calibrate(model, policy, target, val, *halves(corpus.test, data), watch("calibrating"))
    return save_calibration(folder, model, found.record)


def evaluate(
    folder: Path, thresholds: list[float], watch: Callable[[str], Watch] = lambda name: Watch()
) -> list[dict[str, Any]]:
    """The figures of a run's model on its test split, routed at its own thresholds or at others.

    Of a calibrated run, on the half of the test split that its thresholds were not chosen on.

    Args:
        thresholds: common to all exits, one evaluation each; none means the run's own policy.
    """
    model, config, corpus, data = open_run(folder)
    test: Any = TokenBatches(corpus.test, data.seq_len, data.batch_size, max_batches=data.eval_batches)
    split = "test split"
    if config["calibration"]:
        test, split = halves(corpus.test, data)[1], "half of the test split that chose no threshold"
    own = Policy.own(model)
    if thresholds and not own.exits:
        raise EaseError(f"{folder} has no exits to route at: leave out --threshold, or train with a strategy that has")
    policies = [Policy.of(own.exits, (t,) * len(own.exits), **own.options) for t in thresholds] or [own]
    watched = Watched(test, watch("scoring"), epochs=len(policies))
    return [
        {"thresholds": policy.thresholds, "split": split, **score(model, watched, policy).figures()}
        for policy in policies
    ]


def choose_device(name: str) -> str:
    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            raise EaseError(f"no device {name!r} on this machine: use auto, cpu, cuda or mps") from error
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def machine(device: str) -> dict[str, Any]:
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.system(),
    }
