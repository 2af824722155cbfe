"""A run: one recipe from data to report, with the lines that its gain has to be shown beside.

The strategy's phases come first. Then, at the same training FLOPs and on the same data, the lines to compare with:
phase 1 trained on, a plain model of full depth, deep supervision with the same exits. All are scored on the test
split once, and the hard tokens are those of phase 1's final model.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

import torch

import ease
from ease.checkpoint import CHECKPOINTS, fingerprint, goes_on, load_model, run_folder, save_model, write_json
from ease.data import EOS, Corpus, TokenBatches, load_corpus, load_tokenizer
from ease.errors import EaseError, check_least, check_seed
from ease.evaluation import score
from ease.exits import Policy
from ease.figures import Line, decoding, explorer, figures, matched
from ease.flops import head_flops, layer_flops
from ease.machine import choose_device, machine
from ease.models import StandardTransformer
from ease.report import UNROUTED, write_report
from ease.trainer import Data, Phase, PhaseOptions, Strategy, Trainer, TrainingConfig, Watch, train

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Baseline = Literal["full-depth", "continued", "standard", "deep-supervision"]


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

    def __post_init__(self) -> None:
        check_least(1, seq_len=self.seq_len, batch_size=self.batch_size, max_tokens=self.max_tokens)
        check_least(1, epoch_batches=self.epoch_batches, eval_batches=self.eval_batches)


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

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.dtype != "float32" and self.start is None:
            raise EaseError(f"dtype {self.dtype} is that of a checkpoint: name one with --start, or leave it out")


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
            shape = asdict(replace(self.start.config, adapter_exits=(), adapter_dim=0, classifier_exits=()))
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
        kept = self.folder / CHECKPOINTS / "strategy"
        for phase, history in train(model, strategy, data, device=self.device, watch=watch, checkpoints=kept):
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
            yield self.trained_on("continued", name, base, model, config, options, final.total, train_batches)
        plans: dict[Baseline, TrainingConfig] = {
            "standard": ease.create_standard_config(depth),
            "deep-supervision": ease.create_deep_supervision_config(depth),
        }
        for kind, config in plans.items():
            own = phases[0].config
            alike = config.weights == own.weights and config.objective == own.objective
            same = len(lines) == 1 and alike and not (own.layer_lr_scales or own.going_on)
            if same or kind not in self.config.compare:
                continue
            line = self.trained_on(
                kind,
                f"{kind}, {depth} layers",
                start,
                self.new_model(depth),
                config,
                options,
                final.total,
                self.batches("train"),
            )
            if kind == "deep-supervision" and final.policy.exits:
                # The same exits, and as many tokens sent on from each as the strategy sends (on validation).
                val = self.batches("val")
                thresholds = matched(line.model, val, final.policy.exits, score(final.model, val, final.policy))
                line = line._replace(policy=Policy(final.policy.exits, thresholds))
            yield line

    def trained_on(
        self,
        kind: Baseline,
        name: str,
        before: Line,
        model: StandardTransformer,
        config: TrainingConfig,
        options: PhaseOptions,
        flops: float,
        train_batches: TokenBatches,
    ) -> Line:
        """One more phase on all tokens, up to `flops` in all."""
        endless = replace(options, patience=None, max_epochs=10**6, max_flops=flops - before.total, span=(0.0, 1.0))
        phase = Phase(name, config, train_batches, self.batches("val"), endless)
        torch.manual_seed(self.config.seed)
        trainer = Trainer(config, model.config.outputs, self.device)
        history = trainer.run(model, phase, self.watching(name), self.folder / CHECKPOINTS / f"{kind}.safetensors")
        return before.then(name, phase, history, model)


def run(
    config: RunConfig[Any],
    out: Path,
    *,
    overwrite: bool = False,
    watch: Callable[[str], Watch] = lambda line: Watch(),
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
        if goes_on(folder, plan(config, corpus, start), overwrite):
            say(f"going on with the unfinished run in {folder}")
        (folder / "metrics.jsonl").unlink(missing_ok=True)  # every line tells its epochs again
        shop = Workshop(config, folder, corpus, device, watch, start)
        shop.batches("test")  # too short a text should be told before training, not after
        lines, phases, strategy = shop.strategy_lines()
        final, (base, _) = lines[-1], shop.base(lines, phases)
        lines = [*lines, *shop.baselines(lines, phases)]

        summary = describe(config, corpus, final.model, shop.device)
        val, test = shop.batches("val"), shop.batches("test")
        mined = getattr(strategy, "mined", [])
        summary |= figures(lines, base, final, val, test, mined, shop.in_sample, shop.watch("scoring"))
        summary["generation"] = decoding(final, test, watch)
        local = Path(data.source).exists()
        source: dict[str, Any] = {"source": str(Path(data.source).resolve()) if local else data.source}
        source |= {"hash": corpus.hash, "given": start is not None, "eos": eos}
        save_model(folder, final.model, final.policy, ease_version=ease.__version__, run=summary["config"], data=source)
        corpus.tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "summary.json", summary)
        write_json(folder / "explorer.json", explorer(final, corpus, test, summary["sweep"]["points"]))
        write_report([folder], folder / "report.html")
    return summary


def plan(config: RunConfig[Any], corpus: Corpus, start: StandardTransformer | None) -> dict[str, Any]:
    """Everything that decides what a run does: an unfinished one goes on under the same plan alone."""
    code = hashlib.sha256()
    for path in sorted(Path(ease.__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    return {
        "ease": f"{ease.__version__} {code.hexdigest()}",
        "strategy": type(config.strategy).__qualname__,
        "config": asdict(config),
        "text": corpus.hash,
        "start": start and fingerprint(start),
    }


def load_start(name: str, dtype: str = "float32") -> tuple[StandardTransformer, Tokenizer, int | None]:
    """The model to start from, its tokenizer, and the id that ends a text."""
    folder = Path(name)
    if (folder / "summary.json").is_file():
        if dtype != "float32":
            raise EaseError(f"dtype {dtype} is that of a checkpoint, and {name} is a run with its own: leave it out")
        model, config = load_model(folder)
        if model.config.num_labels is not None:
            raise EaseError(f"{name} is a classifier, which writes no text: use a model that predicts tokens")
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        data = config["data"]
        return model, tokenizer, data["eos"] if data.get("given") else tokenizer.token_to_id(EOS)
    from ease import hf

    return hf.from_pretrained(name, dtype=dtype), hf.load_tokenizer(name), hf.end_of_text(name)


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
