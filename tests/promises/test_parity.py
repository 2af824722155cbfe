"""Promise 1: the routed forward, a prefill and token-by-token decoding give the same logits and the same exits.

The routed forward over whole sequences is compared with a naive loop, and every run with a cache is compared with the
routed forward. The naive loop shares only the weights with the model: it has no batch, no mask and no gathering, and
computes one row layer by layer and token by token. All tests use float64, except the one about float32, and policies
under which every exit takes 10 to 90% of the tokens.
"""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from ease import EaseError, Layout, Policy, StandardTransformer, generate, route
from ease.model_config import RopeScaling
from ease.modules import TransformerBlock
from ease.modules.memory import Memory
from ease.routing.confidence import MEASURES
from ease.routing.forward import routed_forward

VOCAB, LAYERS = 256, 5
EXITS = {1: (2,), 2: (1, 3), 3: (1, 2, 4)}
MEMORY = {"memory_orders": (2, 3), "memory_rows": 64}
MODELS = pytest.mark.parametrize(
    ("name", "policy_exits"),
    [("model", EXITS[1]), ("model", EXITS[2]), ("model", EXITS[3]), ("with_memory", (0, 2))],
    ids=["1", "2", "3", "memory"],
)
FEW = st.integers(1, 3)


# The reference


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / ((x * x).sum() / len(x) + eps).sqrt() * weight


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotates a head's vector: entries i and i + d/2 are the real and imaginary part of a complex number."""
    d = len(x)
    angles = torch.tensor([position * theta ** (-2 * i / d) for i in range(d // 2)], dtype=x.dtype)
    rotated = torch.complex(x[: d // 2], x[d // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([rotated.real, rotated.imag])


def naive_layer(
    block: TransformerBlock,
    config: Any,
    states: list[Tensor],
    positions: list[int],
    segments: list[int],
    active: set[int],
) -> list[Tensor]:
    """One layer for one row. Keys and values come from every token; only the tokens in `active` change."""
    d, eps, theta = config.head_size, config.norm_eps, config.rope_theta
    att, ffn = block.attention, block.ffn
    groups = config.num_heads // config.kv_heads
    normed = [norm(x, block.attention_norm.weight, eps) for x in states]
    keys = [[rotate(k, p, theta) for k in (att.k_proj.weight @ h).split(d)] for h, p in zip(normed, positions)]
    values = [(att.v_proj.weight @ h).split(d) for h in normed]
    after = list(states)
    for t in active:
        seen = [u for u in range(len(states)) if segments[u] == segments[t] and positions[u] <= positions[t]]
        mixed = []
        for head, q in enumerate((att.q_proj.weight @ normed[t]).split(d)):
            q = rotate(q, positions[t], theta)
            scores = torch.stack([q @ keys[u][head // groups] / d**0.5 for u in seen]).exp()
            mixed.append(sum(s * values[u][head // groups] for s, u in zip(scores / scores.sum(), seen)))
        x = states[t] + att.o_proj.weight @ torch.cat(mixed)  # type: ignore[arg-type]
        h = norm(x, block.ffn_norm.weight, eps)
        gate = ffn.gate_proj.weight @ h
        after[t] = x + ffn.down_proj.weight @ (gate * gate.sigmoid() * (ffn.up_proj.weight @ h))
    return after


def naive_memory(memory: Memory, ids: list[int], segments: list[int], t: int) -> Tensor:
    """What the memory adds to the embedding at place t: the rows of the n-grams that end there, part by part."""
    before = [ids[u] for u in range(t, -1, -1) if segments[u] == segments[t]] + [-1] * memory.reach
    rows = memory.indices(torch.tensor(before[: memory.reach + 1]))
    return torch.cat([sum(memory.table[row] for row in part) for part in rows.T.tolist()])  # type: ignore[misc]


@torch.no_grad()
def naive_route(
    model: StandardTransformer, ids: list[int], positions: list[int], segments: list[int], policy: Policy
) -> tuple[dict[int, Tensor], dict[int, int]]:
    """Logits and exit of every real token of one row."""
    config, head = model.config, model.output_head.weight
    states = [model.embedding.weight[i] for i in ids]
    running = {t for t in range(len(ids)) if segments[t] >= 0}
    if model.memory is not None:
        states = [states[t] + naive_memory(model.memory, ids, segments, t) for t in range(len(ids))]
    logits, exits = {}, {}
    for k in range(model.first_exit, model.num_layers + 1):
        if k:
            states = naive_layer(model.layers[k - 1], config, states, positions, segments, running)
        threshold = dict(zip(policy.exits, policy.thresholds)).get(k, 0.0 if k == model.num_layers else 2.0)
        for t in sorted(running):
            weight = model.exit_norms[k - 1].weight if k else model.memory.norm.weight
            out = head @ norm(states[t], weight, config.norm_eps)
            if (out.exp() / out.exp().sum()).max() >= threshold:
                logits[t], exits[t] = out, k
                running.discard(t)
    return logits, exits


# Whole sequences


@pytest.fixture(scope="module")
def model(tiny: Callable[..., StandardTransformer]) -> StandardTransformer:
    return tiny(LAYERS, sharp=True, vocab_size=VOCAB, dim=16, num_kv_heads=2).double()


@pytest.fixture(scope="module")
def with_memory(tiny: Callable[..., StandardTransformer]) -> StandardTransformer:
    """The same with a memory whose rows are as large as those of the embedding."""
    made = tiny(LAYERS, sharp=True, vocab_size=VOCAB, dim=16, num_kv_heads=2, **MEMORY).double()
    torch.nn.init.normal_(made.memory.table, std=0.5)
    return made


@st.composite
def rows(draw: st.DrawFn, packed: bool, batch: st.SearchStrategy[int] = FEW) -> list[list[int]]:
    """Segments of each row, -1 for padding on the left, the right, both or neither; at least 10 real tokens."""
    length = draw(st.integers(11, 13))
    segments = []
    for _ in range(draw(batch)):
        left = draw(st.integers(0, 3 if segments else 1))
        right = draw(st.integers(0, 6 if segments else 1 - left))
        real = length - left - right
        parts = [0] * real
        if packed:
            cuts = sorted(draw(st.sets(st.integers(1, real - 1), max_size=3)))
            parts = [sum(t >= cut for cut in cuts) for t in range(real)]
        segments.append([-1] * left + parts + [-1] * right)
    return segments


def setting(segments: list[list[int]], seed: int) -> tuple[Tensor, Layout]:
    """Ids, all different so that no two confidences are equal, and the layout, with positions counted by hand."""
    ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))
    positions = [[row[:t].count(row[t]) if row[t] >= 0 else 0 for t in range(len(row))] for row in segments]
    B, T = len(segments), len(segments[0])
    return ids[: B * T].view(B, T), Layout(torch.tensor(positions), torch.tensor(segments))


@torch.no_grad()
def routed(
    model: StandardTransformer, ids: Tensor, policy: Policy, layout: Layout, cache: Any = None
) -> tuple[Tensor, Tensor]:
    """Logits and exits of the routed forward under any layout."""
    logits = model.output_head.weight.new_zeros(*ids.shape, VOCAB)
    exits = torch.full_like(ids, model.first_exit - 1)
    for stop in routed_forward(model, ids, policy, layout=layout, read=lambda chunk, _: chunk, cache=cache):
        if stop.read is not None:
            logits[stop.left], exits[stop.left] = stop.read, stop.layer
    return logits, exits


def assert_shares(exits: Tensor, policy: Policy) -> None:
    taken = exits[exits >= policy.exits[0]]
    possible = policy.exits[
        max(0, policy.patience - 1) :
    ]  # the first exits have too few exits below them to agree with
    for layer in (*possible, LAYERS):
        assert 0.1 <= (taken == layer).double().mean() <= 0.9


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@MODELS
def test_the_routed_forward_equals_the_naive_loop(
    packed: bool,
    name: str,
    policy_exits: tuple[int, ...],
    request: pytest.FixtureRequest,
    even_policy: Callable[..., Policy],
) -> None:
    model = request.getfixturevalue(name)

    @given(rows(packed), st.integers(0, 99))
    def check(segments: list[list[int]], seed: int) -> None:
        ids, layout = setting(segments, seed)
        policy = even_policy(model, ids, policy_exits, layout)
        logits, exits = routed(model, ids, policy, layout)
        assert_shares(exits, policy)
        for b, row in enumerate(segments):
            expected, leaves = naive_route(model, ids[b].tolist(), layout.positions[b].tolist(), row, policy)
            assert {t: int(e) for t, e in enumerate(exits[b]) if row[t] >= 0} == leaves
            for t, value in expected.items():
                torch.testing.assert_close(logits[b, t], value, rtol=0, atol=1e-10)

    check()


@given(segments=rows(packed=False), seed=st.integers(0, 99))
def test_route_with_a_mask_equals_the_routed_forward(
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
def test_a_row_depends_neither_on_other_rows_nor_on_padding(
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
def test_a_packed_document_does_not_depend_on_other_documents(
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
    running = active if layout is None else active & layout.real
    assert torch.equal(out[~running], state[~running])
    assert not running.any() or not (out[running] == state[running]).all(-1).any()


def test_queries_are_computed_for_active_tokens_and_keys_for_all(
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


# With a cache


def documents(layout: Layout, *results: Tensor) -> list[tuple[Tensor, ...]]:
    """The results (B, T, ...) at the real tokens of each document."""
    parts = []
    for b, row in enumerate(layout.segments):
        parts += [tuple(result[b, row == segment] for result in results) for segment in row.unique() if segment >= 0]
    return parts


def read(
    model: StandardTransformer, texts: list[list[int]], policy: Policy, width: int, chance: random.Random | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Logits and exits of texts read into a cache, one per row, `width` tokens at a time, with padding on either side.

    With `chance`, each row reads a random number of tokens, up to `width`, at a time; sometimes the last tokens of the
    rows are removed from the cache, a random number per row, and read again.
    """
    lengths = [len(text) for text in texts]
    cache, done = model.new_cache(len(texts), max(lengths), key=policy), [0] * len(texts)
    results = [(model.output_head.weight.new_zeros(n, VOCAB), torch.zeros(n, dtype=torch.long)) for n in lengths]
    while done != lengths:
        counts = [min(width if chance is None else chance.randint(0, width), n - d) for n, d in zip(lengths, done)]
        T = max(1, *counts)
        ids, segments = torch.randint(VOCAB, (len(texts), T)), torch.full((len(texts), T), -1)
        for b, (text, n, d) in enumerate(zip(texts, counts, done)):
            at = (T - n) * (b % 2 if chance is None else chance.randint(0, 1))
            ids[b, at : at + n], segments[b, at : at + n] = torch.tensor(text[d : d + n]), 0
        layout = Layout(torch.zeros_like(ids), segments)
        new = routed(model, ids, policy, layout, cache)
        for b, (n, d) in enumerate(zip(counts, done)):
            for result, part in zip(results[b], new):
                result[d : d + n] = part[b, layout.real[b]]
        done = [d + n for n, d in zip(counts, done)]
        assert cache.length.tolist() == done
        if chance is not None and chance.random() < 0.4:
            done = [chance.randint(max(0, d - 3), d) for d in done]
            cache.cut(torch.tensor(done))
    return results


def assert_equal_with_a_cache(
    model: StandardTransformer, ids: Tensor, policy: Policy, layout: Layout, logits: Tensor, exits: Tensor, seed: int
) -> None:
    """A prefill, single tokens, and parts of which some are removed and read again give these logits and exits."""
    whole = documents(layout, ids, logits, exits)
    texts = [text.tolist() for text, *_ in whole]
    for width, chance in ((ids.shape[1], None), (1, None), (4, random.Random(seed))):
        for (_, *expected), result in zip(whole, read(model, texts, policy, width, chance), strict=True):
            torch.testing.assert_close(result[0], expected[0], rtol=0, atol=1e-10)
            assert torch.equal(result[1], expected[1])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("batch", [1, 4, 16])
@MODELS
def test_runs_with_a_cache_equal_the_routed_forward(
    packed: bool,
    batch: int,
    name: str,
    policy_exits: tuple[int, ...],
    request: pytest.FixtureRequest,
    even_policy: Callable[..., Policy],
) -> None:
    """A row of a cache is one document, so each document of a packed row is read into its own row."""
    model = request.getfixturevalue(name)

    @settings(max_examples=3)
    @given(rows(packed, st.just(batch)), st.integers(0, 99))
    def check(segments: list[list[int]], seed: int) -> None:
        ids, layout = setting(segments, seed)
        policy = even_policy(model, ids, policy_exits, layout)
        logits, exits = routed(model, ids, policy, layout)
        assert_shares(exits, policy)
        assert_equal_with_a_cache(model, ids, policy, layout, logits, exits, seed)

    check()


MEASURED = [{"confidence": name, "patience": 2 * (name == "patience")} for name in MEASURES]


def measured_policy(
    model: StandardTransformer, ids: Tensor, layout: Layout | None, options: dict[str, Any], even_policy: Any
) -> Policy:
    if options["patience"]:
        return Policy((3, 4), (1.0, 1.0), **options)
    try:
        return even_policy(model, ids, EXITS[2], layout, **options)
    except EaseError:  # with a half life, not every draw has thresholds in [0, 1] that split its tokens evenly
        reject()


@pytest.fixture(scope="module")
def rich(tiny: Callable[..., StandardTransformer]) -> StandardTransformer:
    """A model with every optional part of a layer and of an exit."""
    options = {"qkv_bias": True, "qk_norm": True, "rope_scaling": RopeScaling(4.0, 1.0, 4.0, 8)}
    adapters = {"adapter_exits": (1,), "adapter_dim": 4}
    model = tiny(LAYERS, sharp=True, vocab_size=VOCAB, dim=16, num_kv_heads=2, **options, **adapters, **MEMORY)
    torch.nn.init.normal_(model.memory.table, std=0.5)
    model.set_classifiers({exit: torch.randn(17) / 4 for exit in range(1, LAYERS)})
    for name, weight in model.named_parameters():
        if "bias" in name or "adapter" in name:
            torch.nn.init.normal_(weight)
    return model.double()


@pytest.mark.parametrize("start", [{}, {"half_life": 0.5, "always_deep": 1}], ids=["anywhere", "deep at the start"])
@pytest.mark.parametrize("measure", MEASURED, ids=MEASURES)
def test_every_measure_is_the_same_with_a_cache(
    measure: dict[str, Any], start: dict[str, Any], rich: StandardTransformer, even_policy: Callable[..., Policy]
) -> None:
    @settings(max_examples=3)
    @given(rows(False, st.integers(4, 8)), st.integers(0, 99))
    def check(segments: list[list[int]], seed: int) -> None:
        ids, layout = setting(segments, seed)
        policy = measured_policy(rich, ids, layout, measure | start, even_policy)
        logits, exits = routed(rich, ids, policy, layout)
        assert_shares(exits, policy)
        assert_equal_with_a_cache(rich, ids, policy, layout, logits, exits, seed)

    check()


@pytest.mark.parametrize("measure", MEASURED, ids=MEASURES)
def test_routed_decoding_equals_the_routed_forward(
    measure: dict[str, Any], rich: StandardTransformer, even_policy: Callable[..., Policy]
) -> None:
    """Tokens, exits and confidences of every step equal those of `route` over the whole text."""
    model, taken = copy.deepcopy(rich), []
    mask = torch.tensor([[0] * (b % 5) + [1] * (9 - b % 5 - b % 4) + [0] * (b % 4) for b in range(16)])
    full = generate(model, torch.randint(VOCAB, mask.shape), 12, attention_mask=mask)
    policy = measured_policy(model, full.tokens, None, measure, even_policy)
    model.policy = policy
    for _ in range(2):
        ids = torch.randint(VOCAB, mask.shape)
        generated = generate(model, ids, 12, "routed", attention_mask=mask)
        taken.append(generated.exits)
        texts = torch.cat([ids, generated.tokens[:, :-1]], 1)
        whole = route(model, texts, attention_mask=torch.cat([mask, torch.ones(16, 11)], 1))
        # The first new token is predicted at the last real token of the prompt.
        before = torch.cat([(mask.cumsum(1) * mask).argmax(1, keepdim=True), torch.arange(9, 20).expand(16, 11)], 1)
        at = torch.arange(16)[:, None], before
        assert torch.equal(whole.logits[at].argmax(-1), generated.tokens)
        assert torch.equal(whole.exits[at], generated.exits)
        torch.testing.assert_close(whole.confidences[at].float(), generated.confidences)
    assert_shares(torch.stack(taken), policy)


@settings(max_examples=30)
@given(data=st.data())
def test_any_pattern_of_active_tokens_gives_the_same_states_with_a_cache(data: st.DataObject) -> None:
    """Independent of any policy: random active tokens, random parts, some of which are removed and read again."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    B, T = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 14))
    model = StandardTransformer(11, 16, LAYERS, 4, num_kv_heads=2).double().eval()
    ids = torch.randint(11, (B, T))
    active = [torch.ones(B, T, dtype=torch.bool)]
    for _ in range(2):
        active.append(active[-1] & (torch.rand(B, T) < data.draw(st.floats(0.1, 0.9))))
    stages = [(1, 2), (3, 3), (4, 5)]
    with torch.no_grad():
        whole = model.embed(ids)
        for (first, last), running in zip(stages, active):
            whole = model.run(whole, first, last, active=running)
        cache, at, parts = model.new_cache(B, T), 0, []
        while at < T:
            end = data.draw(st.integers(at + 1, T))
            state = model.embed(ids[:, at:end])
            for (first, last), running in zip(stages, active):
                state = model.run(state, first, last, active=running[:, at:end], cache=cache)
            if data.draw(st.booleans()):  # read again what was just read
                cache.cut(torch.full((B,), at))
                continue
            parts.append(state)
            at = end
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)


# In float32


def test_float32_differs_only_at_the_threshold(
    trained: StandardTransformer,
    text: Tensor,
    tiny: Callable[..., StandardTransformer],
    even_policy: Callable[..., Policy],
) -> None:
    """Over the whole sequence, as a prefill and token by token."""
    sharp = tiny(LAYERS, sharp=True, dim=16, num_kv_heads=2)
    for model, ids, exits in (
        (trained, text[2048:4096].long().view(16, 128), (1,)),
        (sharp, torch.randint(VOCAB, (16, 64)), EXITS[3]),
    ):
        policy = even_policy(model, ids, exits)
        readings = [route(model, ids, policy.exits, policy.thresholds)[:2]]
        for width in (ids.shape[1], 1):
            logits, taken = zip(*read(model, ids.tolist(), policy, width))
            readings.append((torch.stack(logits), torch.stack(taken)))

        model.double()
        expected = route(model, ids, policy.exits, policy.thresholds)
        confidence = torch.full((model.num_layers, *ids.shape), torch.nan, dtype=torch.float64)
        thresholds = torch.zeros(model.num_layers, dtype=torch.float64)
        with torch.no_grad():
            for stop in routed_forward(model, ids, policy):
                confidence[stop.layer - 1][stop.queried] = stop.confidence
        thresholds[torch.tensor(exits) - 1] = torch.tensor(policy.thresholds, dtype=torch.float64)
        tied = expected.logits.topk(2).values.diff(dim=-1).squeeze(-1) > -1e-4
        for logits, taken in readings:
            moved = taken != expected.exits
            different = logits.argmax(-1) != expected.logits.argmax(-1)
            first_exit = torch.minimum(taken, expected.exits) - 1
            at_threshold = (confidence.gather(0, first_exit[None])[0] - thresholds[first_exit]).abs() < 1e-4
            # Tokens after one that took another exit attend to another state.
            comparable = moved.long().cumsum(1) - moved.long() == 0
            assert not (comparable & moved & ~at_threshold).any()
            assert not (comparable & ~moved & different & ~tied).any()
            assert moved.double().mean() < 0.01
            assert different.double().mean() < 0.01
        for layer in (*exits, model.num_layers):
            assert 0.1 < (expected.exits == layer).double().mean() < 0.9
