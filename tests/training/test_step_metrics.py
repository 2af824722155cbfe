"""The metrics of an optimizer step, as progress receives them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ease import Batch, Phase, PhaseOptions, StandardTransformer, Trainer, TrainingConfig
from ease.progress import Progress, StepMetrics
from ease.training.losses import Distillation
from ease.training.selection import LeastConfident

Make = Callable[..., StandardTransformer]


class Log(Progress):
    def __init__(self) -> None:
        self.metrics: list[StepMetrics] = []

    def step(self, fraction: float, metrics: StepMetrics | None = None) -> None:
        if metrics is not None:
            self.metrics.append(metrics)


def batch() -> Batch:
    x, y = torch.randint(256, (2, 4, 12))
    y[:, :3] = -100
    return Batch(x, y)


@pytest.mark.parametrize(
    "options", [{}, {"objective": Distillation(2.0, 0.5)}, {"selection": LeastConfident({1: 0.5})}], ids=str
)
def test_the_losses_of_exits_add_up_to_the_loss(options: dict[str, Any], tiny: Make) -> None:
    weights, log = {1: 0.3, 2: 0.5, 3: 0.2}, Log()
    config = TrainingConfig(layer_weights=weights, **options)
    batches = [batch(), batch()]
    phase = Phase("one", config, batches, batches, PhaseOptions(lr=1e-3, schedule="cosine", max_epochs=2))
    history = Trainer(config, 256).run(tiny(3, dim=8), phase, log)
    assert [(m.epoch, m.step) for m in log.metrics] == [(1, 1), (1, 2), (2, 3), (2, 4)]
    for metrics in log.metrics:
        assert set(metrics.exit_losses) == set(weights)
        total = sum(weights[exit] * loss for exit, loss in metrics.exit_losses.items())
        assert metrics.loss == pytest.approx(total, rel=1e-5)
        assert metrics.tokens == 36
        assert metrics.grad_norm > 0
    assert [m.lr for m in log.metrics] == pytest.approx([1e-3 * phase.options.lr_factor(i / 4) for i in range(4)])
    assert log.metrics[-1].flops == history.rows[-1]["flops"] - history.flops["validation"] / 2
    assert history.rows[-1]["train_loss"] == pytest.approx((log.metrics[2].loss + log.metrics[3].loss) / 2)


def test_an_exit_without_a_scored_token_has_no_loss(tiny: Make) -> None:
    """Half of the tokens pass layer 1, and none of those has a target."""
    trainer = Trainer(TrainingConfig(layer_weights={1: 0.5, 2: 0.5}, selection=LeastConfident({1: 0.5})), 256)
    model, found = tiny(2), dict[int, torch.Tensor]()
    x = torch.randint(256, (1, 8))
    continued: dict[int, torch.Tensor] = {}
    trainer.compute_loss(model, x, x, continued=continued)
    y = x.masked_fill(continued[1], -100)
    trainer.compute_loss(model, x, y, exit_losses=found)
    assert set(found) == {1}


def test_a_routed_validation_gives_the_shares_of_its_exits(tiny: Make) -> None:
    config = TrainingConfig(layer_weights={1: 0.5, 2: 0.5}, routing_threshold=1e-6, exit_layer=1)
    rows = (
        Trainer(config, 256).run(tiny(2), Phase("one", config, [batch()], [batch()], PhaseOptions(max_epochs=1))).rows
    )
    assert rows[0]["exit_shares"] == {"1": 1.0, "2": 0.0}
    plain = TrainingConfig(layer_weights={2: 1.0})
    rows = Trainer(plain, 256).run(tiny(2), Phase("one", plain, [batch()], [batch()], PhaseOptions(max_epochs=1))).rows
    assert "exit_shares" not in rows[0]
