"""The parts of a layer: rotary positions, who asks, who is seen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ease import Layout, StandardTransformer
from ease.interface import RopeScaling
from ease.modules import FFN, Attention, Plan, TransformerBlock, light_layer, packed
from ease.modules.cache import BLOCK
from ease.modules.rope import rotary, rotate

Make = Callable[..., StandardTransformer]
T = 8


def block(dropout: float = 0.0, kv_heads: int = 4) -> TransformerBlock:
    return TransformerBlock(32, 4, kv_heads, 8, 48, 1e-5, dropout).double()


def plan(state: torch.Tensor, layout: Layout | None = None, active: torch.Tensor | None = None) -> Plan:
    return Plan.make(state, 8, 10_000.0, layout, active)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = []
    for start in (0, 5, 1000):
        cos, sin = rotary(torch.tensor([[start, start + 3]]), 8, 10_000.0, torch.float64)
        assert cos.shape == (1, 1, 2, 8)
        turned_k, turned_q = rotate(k, (cos[:, :, :1], sin[:, :, :1])), rotate(q, (cos[:, :, 1:], sin[:, :, 1:]))
        assert turned_q.norm() == pytest.approx(q.norm().item())
        scores.append((turned_q * turned_k).sum().item())
    assert scores[1:] == pytest.approx(scores[:1] * 2)
    assert scores[0] != pytest.approx((q * k).sum().item())


def test_bfloat16_tells_far_positions_apart() -> None:
    cos, sin = rotary(torch.tensor([[256, 257, 4096, 4097]]), 8, 10_000.0, torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    exact = rotary(torch.tensor([[256, 257, 4096, 4097]]), 8, 10_000.0, torch.float32)
    torch.testing.assert_close(cos.float(), exact[0], rtol=0, atol=5e-3)
    torch.testing.assert_close(sin.float(), exact[1], rtol=0, atol=5e-3)


def test_the_future_is_never_seen() -> None:
    layer, x = block(), torch.randn(2, T, 32, dtype=torch.float64)
    changed = x.clone()
    changed[:, 5:] += 1
    before, after = layer(x, plan(x)), layer(changed, plan(changed))
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all(-1).any()


def test_grouped_heads_share_keys_and_values() -> None:
    """Grouped-query attention is plain attention whose key and value heads are repeated."""
    grouped, plain = block(kv_heads=2), block()
    weights = grouped.state_dict()
    for name in ("attention.k_proj.weight", "attention.v_proj.weight"):
        weights[name] = weights[name].view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32)
    plain.load_state_dict(weights)
    x = torch.randn(2, T, 32, dtype=torch.float64)
    active = torch.rand(2, T) < 0.5
    torch.testing.assert_close(grouped(x, plan(x)), plain(x, plan(x)))
    torch.testing.assert_close(grouped(x, plan(x, active=active)), plain(x, plan(x, active=active)))


def test_active_tokens_compute_what_they_would_anyway() -> None:
    """In one layer who asks changes nothing for those who do: keys and values come from all."""
    layer, x = block(), torch.randn(3, T, 32, dtype=torch.float64)
    active = torch.rand(3, T) < 0.5
    active[1] = False
    everyone, some = layer(x, plan(x)), layer(x, plan(x, active=active))
    torch.testing.assert_close(some[active], everyone[active])
    assert torch.equal(some[~active], x[~active])


def test_with_nobody_active_nothing_happens() -> None:
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
def test_a_plan_takes_the_short_way_when_all_ask(trivial: str) -> None:
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
    assert (made.mask is None) == (trivial != "no padding")


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


def test_an_identity_layer_hands_its_input_through() -> None:
    layer, x = block(), torch.randn(2, T, 32, dtype=torch.float64)
    layer.make_identity()
    assert torch.equal(layer(x, plan(x)), x)
    # And it can learn: the ends of both branches get a gradient.
    layer(x, plan(x)).square().sum().backward()
    for end in (layer.attention.o_proj, layer.ffn.down_proj):
        assert end.weight.grad is not None
        assert end.weight.grad.any()


def test_there_are_no_biases_and_llama_s_names() -> None:
    names = {name for name, _ in block().named_parameters()}
    attention = {f"attention.{p}_proj.weight" for p in "qkvo"}
    ffn = {f"ffn.{p}_proj.weight" for p in ("gate", "up", "down")}
    assert names == attention | ffn | {"attention_norm.weight", "ffn_norm.weight"}
    assert isinstance(Attention(8, 2, 1, 4).k_proj, nn.Linear)
    x, ffn = torch.randn(3, 8), FFN(8, 16)
    gate = ffn.gate_proj(x)
    torch.testing.assert_close(ffn(x), ffn.down_proj(gate * gate.sigmoid() * ffn.up_proj(x)))


def test_scaled_rotary_keeps_fast_pairs_and_slows_slow_ones() -> None:
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)
    turns = torch.tensor([10.0, 4.0, 2.5, 1.0, 0.1])  # of a pair of dimensions within the original 64 positions
    frequencies = turns * 2 * torch.pi / 64
    kept = torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0])
    torch.testing.assert_close(scaling(frequencies), frequencies * (kept + (1 - kept) / 8))


def test_with_biases_and_norms_active_tokens_get_what_they_get_among_all() -> None:
    layer = TransformerBlock(32, 4, 2, 8, 48, 1e-5, 0.0, qkv_bias=True, qk_norm=True).double()
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_light_layer_computes_what_the_layer_does(dtype: torch.dtype) -> None:
    layer = block(dropout=0.5, kv_heads=2).to(dtype)
    for name, weight in layer.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    x = torch.randn(2, T, 32, dtype=dtype)
    with torch.no_grad():
        expected = layer.eval()(x, plan(x))
        torch.testing.assert_close(light_layer(layer)(x, plan(x)), expected)
        heard: list[str] = []
        layer.ffn.down_proj.register_forward_hook(lambda *_: heard.append("down"))
        torch.testing.assert_close(light_layer(layer.train())(x, plan(x)), expected)
    assert heard == ["down"]


# With a cache


def read_twice(model: StandardTransformer, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States after some tokens went on from layer 1, read as a whole and into a cache in two parts."""
    state = torch.randn(rows, length, model.config.dim, dtype=model.embedding.weight.dtype)
    active = torch.rand(rows, length) < 0.5
    active[0, : length // 2] = False  # a row of which no token goes on
    whole = model.run(model.run(state, 1, 1), 2, 3, active=active)
    cache, parts = model.new_cache(rows, length), []
    for part, on in zip(state.split(length // 2, 1), active.split(length // 2, 1), strict=True):
        parts.append(model.run(model.run(part, 1, 1, cache=cache), 2, 3, active=on, cache=cache))
    return whole, torch.cat(parts, 1)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_long_text_is_read_in_blocks_of_queries(rows: int) -> None:
    model = StandardTransformer(11, 16, 3, 4, num_kv_heads=2).double().eval()
    with torch.no_grad():
        whole, read = read_twice(model, rows, 6 * BLOCK)
    torch.testing.assert_close(read, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "dtype", "fits"),
    [
        ({}, torch.float64, True),
        ({"num_kv_heads": 2}, torch.float32, True),
        ({"qk_norm": True}, torch.float64, False),
        ({"qkv_bias": True}, torch.float64, False),
        ({"hidden_dim": 30_000}, torch.float32, False),
        ({}, torch.bfloat16, False),
    ],
)
def test_small_plain_layers_are_packed_and_no_others(options: dict[str, Any], dtype: torch.dtype, fits: bool) -> None:
    layer = StandardTransformer(11, 16, 1, 4, **options).to(dtype).layers[0]
    assert (getattr(packed(layer), "__name__", "") == "run") is fits
    layer.ffn.up_proj.register_forward_hook(lambda *_: None)
    assert getattr(packed(layer), "__name__", "") != "run"


def test_a_gradient_passes_what_is_read_into_a_cache() -> None:
    model = StandardTransformer(11, 16, 1, 4)
    state = torch.randn(2, 5, 16)
    model.run(state, 1, 1, cache=model.new_cache(2, 5)).sum().backward()
    assert model.layers[0].ffn.up_proj.weight.grad is not None
