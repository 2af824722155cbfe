"""An interrupt saves a checkpoint first, and the resumed phase ends with the same bits."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ease import Data, StandardConfig, StandardTransformer, TokenBatches, train
from ease.progress import Progress, StepMetrics
from ease.training.checkpoint import deferred_interrupts
from ease.training.phases import History

Make = Callable[..., StandardTransformer]


class Interrupt(Progress):
    """Sends Ctrl-C after some steps, or while an epoch's metrics are reported."""

    def __init__(self, at: int, when: str) -> None:
        self.at, self.when, self.steps, self.places = at, when, 0, list[tuple[int, int]]()

    def step(self, fraction: float, metrics: StepMetrics | None = None) -> None:
        self.steps += 1
        if self.when == "step" and self.steps == self.at:
            os.kill(os.getpid(), signal.SIGINT)

    def epoch(self, row: object) -> None:
        if self.when == "epoch":
            os.kill(os.getpid(), signal.SIGINT)

    def resumed(self, epoch: int, step: int) -> None:
        self.places.append((epoch, step))


@pytest.mark.parametrize("when", ["step", "epoch"])
def test_ctrl_c_saves_before_the_first_checkpoint_is_due(
    when: str, tiny: Make, text_data: Callable[..., Data], tmp_path: Path
) -> None:
    def run(progress: Progress, folder: Path | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model, data = tiny(2), text_data(4, 1)
        config = StandardConfig(num_layers=2, max_epochs=2, patience=None)
        list(train(model, config.strategy(), data, progress=lambda _: progress, checkpoints=folder))
        return model.state_dict()

    whole = run(Progress(), None)
    with pytest.raises(KeyboardInterrupt):
        run(Interrupt(2, when), tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    resumed = Interrupt(0, "never")
    assert all(torch.equal(whole[name], value) for name, value in run(resumed, tmp_path).items())
    assert len(resumed.places) == 1
    epoch, step = resumed.places[0]
    assert (epoch, step) == (1, 2) if when == "step" else epoch == 2


def test_an_interrupt_waits_only_where_it_must() -> None:
    with pytest.raises(KeyboardInterrupt), deferred_interrupts(True) as interrupts:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.pending
        with pytest.raises(KeyboardInterrupt), interrupts.allowed():
            pass
        with pytest.raises(KeyboardInterrupt):  # the second Ctrl-C does not wait
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_in_the_validation_that_ends_a_phase_costs_no_step(tiny: Make, tmp_path: Path) -> None:
    """The budget is used up then, so the resumed phase validates and takes no further step."""
    ids = torch.randint(256, (4000,), dtype=torch.int32)

    class Val(list[tuple[torch.Tensor, torch.Tensor]]):
        interrupt = 0

        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            self.interrupt -= 1
            if self.interrupt == 0:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__iter__()

    def run(folder: Path, interrupt: int = 0) -> tuple[History, dict[str, torch.Tensor], torch.Tensor]:
        torch.manual_seed(0)
        model, data = tiny(1, dropout=0.1), Data(TokenBatches(ids, 16, 8, max_batches=5, shuffle=True), val)
        val.interrupt = interrupt
        options = StandardConfig(num_layers=1, patience=None, max_epochs=99, max_flops=4e8)
        (_, history), *_ = train(model, options.strategy(), data, checkpoints=folder)
        return history, model.state_dict(), torch.get_rng_state()

    val = Val(TokenBatches(ids, 16, 8, max_batches=2))
    whole, weights, random = run(tmp_path / "whole")
    assert whole.steps % 5, "the budget ends within an epoch"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "again", interrupt=len(whole.rows) + 1)  # the first batch was read once before
    again, weights_again, random_again = run(tmp_path / "again")
    assert again.column("step") == whole.column("step")
    assert all(torch.equal(weights[name], value) for name, value in weights_again.items())
    assert torch.equal(random, random_again)
