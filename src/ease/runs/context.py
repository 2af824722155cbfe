"""ease.runs.context."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ease.data.batches import TokenBatches
from ease.data.corpus import Corpus
from ease.errors import EaseError
from ease.evaluation.scoring import score
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.progress import Progress
from ease.report.verdict import UNROUTED
from ease.runs.config import Baseline, RunConfig
from ease.runs.lines import Line
from ease.runs.metrics import matched
from ease.storage import CHECKPOINTS
from ease.trainer import Trainer, train
from ease.training.config import PhaseOptions, TrainingConfig, create_deep_supervision_config, create_standard_config
from ease.training.phases import Data, Phase, Strategy

if TYPE_CHECKING:
    pass


class MetricsLog(Progress):
    """Writes every epoch to metrics.jsonl as it ends, and passes it on."""

    def __init__(self, path: Path, line: str, inner: Progress) -> None:
        self.path, self.line, self.inner = path, line, inner

    def step(self, fraction: float, loss: float = math.nan) -> None:
        self.inner.step(fraction, loss)

    def epoch(self, row: Mapping[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"line": self.line, **row}) + "\n")
        self.inner.epoch(row)


@dataclass
class RunContext:
    """What the parts of a run share."""

    config: RunConfig[Any]
    folder: Path
    corpus: Corpus
    device: str
    progress: Callable[[str], Progress]
    start: StandardTransformer | None = None

    @property
    def in_sample(self) -> bool:
        """Whether the strategy validates on tokens that it trains on."""
        return getattr(self.config.strategy, "protocol", None) == "seed"

    def watching(self, line: str, label: str | None = None) -> Progress:
        return MetricsLog(self.folder / "metrics.jsonl", line, self.progress(label or line))

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
        strategy, data = (
            self.config.strategy.strategy(),
            Data(self.batches("train"), self.batches("val"), self.progress),
        )
        line = Line("start", model, Policy(), [], {}, 0.0)
        lines: list[Line] = []
        if self.start is not None:
            line = line._replace(name="as it came")
            lines.append(line._replace(model=copy.deepcopy(model)))
        phases: list[Phase] = []
        suffix = ", in-sample" if self.in_sample else ""
        progress = lambda phase: self.watching(phase.name, phase.name + suffix)  # noqa: E731
        kept = self.folder / CHECKPOINTS / "strategy"
        for phase, history in train(model, strategy, data, device=self.device, progress=progress, checkpoints=kept):
            line = line.then(phase.name, phase, history, copy.deepcopy(model))
            lines.append(line)
            phases.append(phase)
        lines[-1] = line._replace(policy=strategy.policy())  # which may have been found when all was trained
        return lines, phases, strategy

    def base(self, lines: list[Line], phases: list[Phase]) -> tuple[Line, TrainingConfig]:
        """What the first later phase built on, phase 1 or the model as it came, and the loss it learned with."""
        came = len(lines) - len(phases)
        at = next((i for i, phase in enumerate(phases) if phase.first > 1), 1 - came) - 1 + came
        own = phases[at - came].config if at >= came else create_standard_config(lines[at].model.num_layers)
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
            "standard": create_standard_config(depth),
            "deep-supervision": create_deep_supervision_config(depth),
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
