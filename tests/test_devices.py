"""Devices and dtypes by name, and the description of the machine in reports."""

from __future__ import annotations

import pytest
import torch

from ease import EaseError
from ease.devices import choose_device, choose_dtype, machine


def test_only_devices_of_this_machine_are_accepted() -> None:
    assert choose_device("cpu") == "cpu"
    torch.empty(0, device=choose_device("auto"))
    for name in ("abacus", "cuda:99", "meta"):
        with pytest.raises(EaseError, match=f"no device '{name}' on this machine: use auto, cpu"):
            choose_device(name)


def test_a_dtype_may_be_named() -> None:
    assert choose_dtype("bfloat16") == choose_dtype(torch.bfloat16) == torch.bfloat16
    assert choose_dtype("auto") is choose_dtype(None) is None
    for bad in ("float99", "int8", "nn", torch.int8):
        with pytest.raises(EaseError, match="for weights: use auto, float32, bfloat16"):
            choose_dtype(bad)


def test_the_machine_description_has_device_cpu_and_threads() -> None:
    about = machine("cpu")
    assert about["device"] == "cpu"
    assert about["cpu"]
    assert about["threads"] == torch.get_num_threads() == 1
    assert about["torch"] == torch.__version__
