"""Promise 1, over whole sequences: the routed forward computes what a naive token-by-token loop computes.

The reference shares the model's weights and nothing else: no batch, no mask, no gathering; it walks layer by
layer and token by token through one row. Everything is float64, and policies send every exit 10 to 90% of the
tokens.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ease import Layout, Policy, StandardTransformer, compute_confidence, route
from ease.exits import walk
from ease.models import TransformerBlock

VOCAB, LAYERS = 96, 5
EXITS = {1: (2,), 2: (1, 3), 3: (1, 2, 4)}


# The reference


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / ((x * x).sum() / len(x) + eps).sqrt() * weight


def turn(x: Tensor, position: int, theta: float) -> Tensor:
    """A head's vector turned: halves i and i + d/2 are the parts of one complex number."""
    d = len(x)
    angles = torch.tensor([position * theta ** (-2 * i / d) for i in range(d // 2)], dtype=x.dtype)
    turned = torch.complex(x[: d // 2], x[d // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag])


def naive_layer(
    block: TransformerBlock,
    config: Any,
    states: list[Tensor],
    positions: list[int],
    segments: list[int],
    asks: set[int],
) -> list[Tensor]:
    """One layer for one row. Every token offers its current state; only the tokens in `asks` change."""
    d, eps, theta = config.head_size, config.norm_eps, config.rope_theta
    att, ffn = block.attention, block.ffn
    groups = config.num_heads // config.kv_heads
    normed = [norm(x, block.attention_norm.weight, eps) for x in states]
    keys = [[turn(k, p, theta) for k in (att.k_proj.weight @ h).split(d)] for h, p in zip(normed, positions)]
    values = [(att.v_proj.weight @ h).split(d) for h in normed]
    after = list(states)
    for t in asks:
        seen = [u for u in range(len(states)) if segments[u] == segments[t] and positions[u] <= positions[t]]
        mixed = []
        for head, q in enumerate((att.q_proj.weight @ normed[t]).split(d)):
            q = turn(q, positions[t], theta)
            scores = torch.stack([q @ keys[u][head // groups] / d**0.5 for u in seen]).exp()
            mixed.append(sum(s * values[u][head // groups] for s, u in zip(scores / scores.sum(), seen)))
        x = states[t] + att.o_proj.weight @ torch.cat(mixed)  # type: ignore[arg-type]
        h = norm(x, block.ffn_norm.weight, eps)
        gate = ffn.gate_proj.weight @ h
        after[t] = x + ffn.down_proj.weight @ (gate * gate.sigmoid() * (ffn.up_proj.weight @ h))
    return after


@torch.no_grad()
def naive_route(
    model: StandardTransformer, ids: list[int], positions: list[int], segments: list[int], policy: Policy
) -> tuple[dict[int, Tensor], dict[int, int]]:
    """Logits and exit of every real token of one row."""
    config, head = model.config, model.output_head.weight
    states = [model.embedding.weight[i] for i in ids]
    running = {t for t in range(len(ids)) if segments[t] >= 0}
    logits, exits = {}, {}
    for k in range(1, model.num_layers + 1):
        states = naive_layer(model.layers[k - 1], config, states, positions, segments, running)
        threshold = dict(zip(policy.exits, policy.thresholds)).get(k, 0.0 if k == model.num_layers else 2.0)
        for t in sorted(running):
            out = head @ norm(states[t], model.exit_norms[k - 1].weight, config.norm_eps)
            if (out.exp() / out.exp().sum()).max() >= threshold:
                logits[t], exits[t] = out, k
                running.discard(t)
    return logits, exits


# What is tested


@pytest.fixture(scope="module")
def model(tiny: Callable[..., StandardTransformer]) -> StandardTransformer:
    return tiny(LAYERS, sharp=True, vocab_size=VOCAB, dim=16, num_kv_heads=2).double()


@st.composite
def rows(draw: st.DrawFn, packed: bool) -> list[list[int]]:
    """Per row its segments, -1 for padding on the left, on the right, both or not at all; 10 real tokens or more."""
    length = draw(st.integers(11, 13))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        left = draw(st.integers(0, 1))
        right = draw(st.integers(0, (1 if not found else 6) - (left if not found else 0)))
        real = length - left - right
        parts = [0] * real
        if packed:
            cuts = sorted(draw(st.sets(st.integers(1, real - 1), max_size=3)))
            parts = [sum(t >= cut for cut in cuts) for t in range(real)]
        found.append([-1] * left + parts + [-1] * right)
    return found


def setting(segments: list[list[int]], seed: int) -> tuple[Tensor, Layout]:
    """Ids, all different so that no two confidences tie, and the layout, positions counted by hand."""
    ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))
    positions = [[row[:t].count(row[t]) if row[t] >= 0 else 0 for t in range(len(row))] for row in segments]
    B, T = len(segments), len(segments[0])
    return ids[: B * T].view(B, T), Layout(torch.tensor(positions), torch.tensor(segments))


@torch.no_grad()
def routed(model: StandardTransformer, ids: Tensor, policy: Policy, layout: Layout) -> tuple[Tensor, Tensor]:
    """Logits and exits that the routed forward gives under any layout."""
    logits = torch.zeros(*ids.shape, VOCAB, dtype=torch.float64)
    exits = torch.zeros_like(ids)
    for stop in walk(model, ids, policy, layout=layout, read=lambda chunk, _: chunk):
        assert stop.read is not None
        logits[stop.left], exits[stop.left] = stop.read, stop.layer
    return logits, exits


def assert_shares(exits: Tensor, policy: Policy) -> None:
    taken = exits[exits > 0]
    for layer in (*policy.exits, LAYERS):
        assert 0.1 <= (taken == layer).double().mean() <= 0.9


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_routed_forward_equals_the_naive_loop(
    packed: bool, count: int, model: StandardTransformer, even_policy: Callable[..., Policy]
) -> None:
    @given(rows(packed), st.integers(0, 99))
    def check(segments: list[list[int]], seed: int) -> None:
        ids, layout = setting(segments, seed)
        policy = even_policy(model, ids, EXITS[count], layout)
        logits, exits = routed(model, ids, policy, layout)
        assert_shares(exits, policy)
        for b, row in enumerate(segments):
            expected, leaves = naive_route(model, ids[b].tolist(), layout.positions[b].tolist(), row, policy)
            assert {t: int(e) for t, e in enumerate(exits[b]) if e} == leaves
            for t, value in expected.items():
                torch.testing.assert_close(logits[b, t], value, rtol=0, atol=1e-10)

    check()


@given(segments=rows(packed=False), seed=st.integers(0, 99))
def test_route_with_a_mask_is_the_same_forward(
    segments: list[list[int]], seed: int, model: StandardTransformer, even_policy: Callable[..., Policy]
) -> None:
    ids, layout = setting(segments, seed)
    policy = even_policy(model, ids, (1, 3), layout)
    mask = torch.tensor(segments) >= 0
    logits, exits = routed(model, ids, policy, layout)
    result = route(model, ids, policy.exits, policy.thresholds, mask)
    assert torch.equal(result.exits, exits)
    assert torch.equal(result.logits, logits)
    torch.testing.assert_close(result.confidences[mask], logits.softmax(-1).amax(-1)[mask], rtol=0, atol=1e-12)
    assert not result.exits[~mask].any()


@given(segments=rows(packed=False), seed=st.integers(0, 99), count=st.integers(1, 3))
def test_a_row_does_not_depend_on_the_others_nor_on_padding(
    segments: list[list[int]], seed: int, count: int, model: StandardTransformer, even_policy: Callable[..., Policy]
) -> None:
    ids, layout = setting(segments, seed)
    policy = even_policy(model, ids, EXITS[count], layout)
    logits, exits = routed(model, ids, policy, layout)
    for b in range(len(ids)):
        real = layout.real[b]
        alone = route(model, ids[b : b + 1, real], policy.exits, policy.thresholds)
        assert torch.equal(alone.exits[0], exits[b, real])
        torch.testing.assert_close(alone.logits[0], logits[b, real], rtol=0, atol=1e-10)


@given(segments=rows(packed=True), seed=st.integers(0, 99), count=st.integers(1, 3))
def test_a_packed_document_does_not_see_the_others(
    segments: list[list[int]], seed: int, count: int, model: StandardTransformer, even_policy: Callable[..., Policy]
) -> None:
    ids, layout = setting(segments, seed)
    policy = even_policy(model, ids, EXITS[count], layout)
    logits, exits = routed(model, ids, policy, layout)
    for b in range(len(ids)):
        for segment in set(segments[b]) - {-1}:
            inside = layout.segments[b] == segment
            alone = route(model, ids[b : b + 1, inside], policy.exits, policy.thresholds)
            assert torch.equal(alone.exits[0], exits[b, inside])
            torch.testing.assert_close(alone.logits[0], logits[b, inside], rtol=0, atol=1e-10)


@given(segments=rows(packed=True), seed=st.integers(0, 99), other=st.integers(0, VOCAB - 1))
def test_padding_ids_change_nothing(
    segments: list[list[int]], seed: int, other: int, model: StandardTransformer, even_policy: Callable[..., Policy]
) -> None:
    ids, layout = setting(segments, seed)
    policy = even_policy(model, ids, (1, 2, 4), layout)
    logits, exits = routed(model, ids, policy, layout)
    changed, again = routed(model, ids.masked_fill(~layout.real, other), policy, layout)
    assert torch.equal(changed, logits)
    assert torch.equal(again, exits)
    assert not exits[~layout.real].any()


@given(seed=st.integers(0, 99), share=st.floats(0, 1), T=st.integers(1, 9), layered=st.booleans())
def test_states_that_left_stay_bit_identical(
    seed: int, share: float, T: int, layered: bool, model: StandardTransformer
) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(3, T, 16, generator=generator, dtype=torch.float64)
    active = torch.rand(3, T, generator=generator) < share
    layout = Layout.from_attention_mask(torch.rand(3, T, generator=generator).argsort(1) > 0) if layered else None
    out = model.run(state, 2, 4, layout=layout, active=active)
    asked = active if layout is None else active & layout.real
    assert torch.equal(out[~asked], state[~asked])
    assert not asked.any() or not (out[asked] == state[asked]).all(-1).any()


def test_only_active_tokens_ask_and_all_give_keys(
    model: StandardTransformer, even_policy: Callable[..., Policy]
) -> None:
    ids, layout = setting([[-1] * 3 + [0] * 9, [0] * 12, [0] * 5 + [1] * 5 + [-1] * 2], 0)
    policy = even_policy(model, ids, (1, 3), layout)
    rows: dict[str, list[int]] = {"q_proj": [], "o_proj": [], "gate_proj": [], "down_proj": [], "k_proj": []}
    hooks = []
    for block in model.layers:
        for name in rows:
            module = block.get_submodule(("ffn." if name in ("gate_proj", "down_proj") else "attention.") + name)
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, inputs, name=name: rows[name].append(inputs[0].numel() // inputs[0].shape[-1])
                )
            )
    _, exits = routed(model, ids, policy, layout)
    for hook in hooks:
        hook.remove()
    active = [int((exits >= layer).sum()) for layer in range(1, LAYERS + 1)]
    assert active[0] == int(layout.real.sum()) > active[1] == active[2] > active[3] == active[4] > 0
    for name in ("q_proj", "o_proj", "gate_proj", "down_proj"):
        assert rows[name] == active
    assert rows["k_proj"] == [ids.numel()] * LAYERS


def test_float32_differs_only_at_the_threshold(
    trained: StandardTransformer, text: Tensor, even_policy: Callable[..., Policy]
) -> None:
    ids = text[2048:4096].long().view(16, 128)
    policy = even_policy(trained, ids, (1,))
    single = route(trained, ids, policy.exits, policy.thresholds)
    double = route(trained.double(), ids, policy.exits, policy.thresholds)
    confidence = compute_confidence(trained, trained.forward_to_layer(ids, 1), 1)
    top = double.logits.topk(2).values
    near = ((confidence - policy.thresholds[0]).abs() < 1e-4, top[..., 0] - top[..., 1] < 1e-4)
    moved = single.exits != double.exits
    other = single.logits.argmax(-1) != double.logits.argmax(-1)
    assert not (moved & ~near[0]).any()
    assert not (other & ~(near[0] | near[1])).any()
    assert moved.double().mean() < 0.01
    assert other.double().mean() < 0.01
    assert 0.1 < (double.exits == 1).double().mean() < 0.9
