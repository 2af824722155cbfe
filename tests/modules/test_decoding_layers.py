"""Layers for decoding: the functional and the packed form compute what the layer does."""

from typing import Any

import pytest
import torch

from ease import StandardTransformer
from ease.modules import Plan, TransformerBlock
from ease.modules.decoding import decoding_layer, functional_layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_functional_layer_equals_the_layer_in_eval_mode(dtype: torch.dtype) -> None:
    layer = TransformerBlock(32, 4, 2, 8, 48, 1e-5, dropout=0.5).to(dtype)
    for name, weight in layer.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    x = torch.randn(2, 8, 32, dtype=dtype)
    plan = Plan.make(x, 8, 10_000.0, None, None)
    with torch.no_grad():
        expected = layer.eval()(x, plan)
        torch.testing.assert_close(functional_layer(layer)(x, plan), expected)
        hooked: list[str] = []
        layer.ffn.down_proj.register_forward_hook(lambda *_: hooked.append("down"))
        torch.testing.assert_close(functional_layer(layer.train())(x, plan), expected)
    assert hooked == ["down"]


@pytest.mark.parametrize(
    ("options", "dtype", "packable"),
    [
        ({}, torch.float64, True),
        ({"num_kv_heads": 2}, torch.float32, True),
        ({"qk_norm": True}, torch.float64, False),
        ({"qkv_bias": True}, torch.float64, False),
        ({"hidden_dim": 30_000}, torch.float32, False),
        ({}, torch.bfloat16, False),
    ],
)
def test_only_small_standard_layers_are_packed(options: dict[str, Any], dtype: torch.dtype, packable: bool) -> None:
    layer = StandardTransformer(11, 16, 1, 4, **options).to(dtype).layers[0]
    assert (getattr(decoding_layer(layer), "__name__", "") == "run") is packable
    layer.ffn.up_proj.register_forward_hook(lambda *_: None)
    assert getattr(decoding_layer(layer), "__name__", "") != "run"
