"""Transformer blocks and their plans: causality, active tokens, padding, and gradients."""

from typing import Any

import pytest
import torch
from torch import nn

from ease import Layout, ModelConfig
from ease.model_config import AttentionKind
from ease.modules import FFN, Attention, Plan, TransformerBlock

T = 8


def shape(**options: Any) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 9, "dim": 32, "num_heads": 4, "hidden_dim": 48} | options)


def block(dropout: float = 0.0, kv_heads: int = 4) -> TransformerBlock:
    return TransformerBlock(shape(num_kv_heads=kv_heads, dropout=dropout)).double()


def plan(state: torch.Tensor, layout: Layout | None = None, active: torch.Tensor | None = None) -> Plan:
    return Plan.make(state, 8, layout, active)


def test_attention_is_causal() -> None:
    layer, x = block(), torch.randn(2, T, 32, dtype=torch.float64)
    changed = x.clone()
    changed[:, 5:] += 1
    before, after = layer(x, plan(x)), layer(changed, plan(changed))
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all(-1).any()


def test_grouped_heads_share_keys_and_values() -> None:
    """Grouped-query attention equals multi-head attention with repeated key and value heads."""
    grouped, plain = block(kv_heads=2), block()
    weights = grouped.state_dict()
    for name in ("attention.k_proj.weight", "attention.v_proj.weight"):
        weights[name] = weights[name].view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32)
    plain.load_state_dict(weights)
    x = torch.randn(2, T, 32, dtype=torch.float64)
    active = torch.rand(2, T) < 0.5
    torch.testing.assert_close(grouped(x, plan(x)), plain(x, plan(x)))
    torch.testing.assert_close(grouped(x, plan(x, active=active)), plain(x, plan(x, active=active)))


def test_active_tokens_do_not_depend_on_which_others_are_active() -> None:
    """Within one layer: keys and values come from all tokens."""
    layer, x = block(), torch.randn(3, T, 32, dtype=torch.float64)
    active = torch.rand(3, T) < 0.5
    active[1] = False
    everyone, some = layer(x, plan(x)), layer(x, plan(x, active=active))
    torch.testing.assert_close(some[active], everyone[active])
    assert torch.equal(some[~active], x[~active])


def test_without_active_tokens_the_state_is_unchanged() -> None:
    layer, x = block(), torch.randn(2, T, 32, dtype=torch.float64)
    assert torch.equal(layer(x, plan(x, active=torch.zeros(2, T, dtype=torch.bool))), x)
    padding = Layout.from_attention_mask(torch.zeros(2, T))
    assert torch.equal(layer(x, plan(x, padding)), x)


def test_gradients_flow_through_the_keys_of_tokens_that_left() -> None:
    layer, x = block(), torch.randn(1, T, 32, dtype=torch.float64, requires_grad=True)
    active = torch.zeros(1, T, dtype=torch.bool)
    active[0, 5] = True
    layer(x, plan(x, active=active))[0, 5].sum().backward()
    assert x.grad is not None
    assert x.grad[0, :6].any(-1).all()
    assert not x.grad[0, 6:].any()


@pytest.mark.parametrize("trivial", ["nothing", "all active", "no padding"])
def test_a_plan_without_inactive_tokens_copies_nothing(trivial: str) -> None:
    x, everyone = torch.randn(2, T, 32), torch.ones(2, T, dtype=torch.bool)
    made = plan(
        x,
        Layout.from_attention_mask(everyone) if trivial == "no padding" else None,
        everyone if trivial == "all active" else None,
    )
    assert made.rows is None
    assert made.gather(x) is x
    assert made.scatter(x, x) is x
    assert made.pad(x) is x
    assert made.unpad(x) is x
    assert (made.view(AttentionKind()).mask is None) == (trivial != "no padding")


def test_gather_pad_unpad_and_scatter_are_inverses() -> None:
    x, active = torch.randn(3, T, 5), torch.rand(3, T) < 0.4
    active[1] = False
    made = plan(torch.randn(3, T, 8), active=active)
    some = made.gather(x)
    assert torch.equal(some, x[active])
    assert made.pad(some).shape == (3, int(active.sum(1).max()), 5)
    assert torch.equal(made.unpad(made.pad(some)), some)
    assert torch.equal(made.scatter(x, some), x)
    assert torch.equal(made.scatter(x, some + 1)[active], some + 1)
    assert torch.equal(made.scatter(x, some + 1)[~active], x[~active])


def test_dropout_only_in_training_mode() -> None:
    layer, x = block(dropout=0.5), torch.randn(2, T, 32, dtype=torch.float64)
    assert not torch.allclose(layer(x, plan(x)), layer(x, plan(x)))
    layer.eval()
    assert torch.equal(layer(x, plan(x)), layer(x, plan(x)))


def test_an_identity_layer_returns_its_input() -> None:
    layer, x = block(), torch.randn(2, T, 32, dtype=torch.float64)
    layer.make_identity()
    assert torch.equal(layer(x, plan(x)), x)
    # It can be trained: the output projections of both branches get a gradient.
    layer(x, plan(x)).square().sum().backward()
    for end in (layer.attention.o_proj, layer.ffn.down_proj):
        assert end.weight.grad is not None
        assert end.weight.grad.any()


def test_parameter_names_are_those_of_llama() -> None:
    names = {name for name, _ in block().named_parameters()}
    attention = {f"attention.{p}_proj.weight" for p in "qkvo"}
    ffn = {f"ffn.{p}_proj.weight" for p in ("gate", "up", "down")}
    assert names == attention | ffn | {"attention_norm.weight", "ffn_norm.weight"}
    assert isinstance(Attention(shape(dim=8, num_heads=2, num_kv_heads=1)).k_proj, nn.Linear)
    x, ffn = torch.randn(3, 8), FFN(shape(dim=8, hidden_dim=16))
    gate = ffn.gate_proj(x)
    torch.testing.assert_close(ffn(x), ffn.down_proj(gate * gate.sigmoid() * ffn.up_proj(x)))


def test_active_tokens_with_biases_and_norms() -> None:
    layer = TransformerBlock(shape(num_kv_heads=2, qkv_bias=True, qk_norm=True)).double()
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if "bias" in name or "q_norm" in name or "k_norm" in name:
                weight.uniform_(0.5, 1.5)
    x = torch.randn(2, T, 32, dtype=torch.float64)
    active = torch.rand(2, T) < 0.5
    active[0, 0] = True
    every, some = layer(x, plan(x)), layer(x, plan(x, active=active))
    torch.testing.assert_close(some[active], every[active])
    assert torch.equal(some[~active], x[~active])
