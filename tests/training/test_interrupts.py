"""An interrupt saves a checkpoint first, and the resumed phase ends with the same bits."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ease import Data, StandardConfig, StandardTransformer, train
from ease.progress import Progress
from ease.training.checkpoint import deferred_interrupts

Make = Callable[..., StandardTransformer]


class Interrupt(Progress):
    """Sends Ctrl-C after some steps, or while an epoch's metrics are reported."""

    def __init__(self, at: int, when: str) -> None:
        self.at, self.when, self.steps, self.places = at, when, 0, list[tuple[int, int]]()

    def step(self, fraction: float, loss: float = float("nan")) -> None:
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
