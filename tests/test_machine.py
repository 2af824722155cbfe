"""The device that was asked for, or one sentence; and the machine as a report names it."""

from __future__ import annotations

import pytest
import torch

from ease import EaseError
from ease.machine import choose_device, machine


def test_a_device_is_one_that_works_here() -> None:
    assert choose_device("cpu") == "cpu"
    torch.empty(0, device=choose_device("auto"))
    for name in ("abacus", "cuda:99"):
        with pytest.raises(EaseError, match=f"no device '{name}' on this machine: use auto, cpu"):
            choose_device(name)


def test_a_machine_is_named_by_what_a_time_depends_on() -> None:
    about = machine("cpu")
    assert about["device"] == "cpu"
    assert about["cpu"]
    assert about["threads"] == torch.get_num_threads() == 1
    assert about["torch"] == torch.__version__
