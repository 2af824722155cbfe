"""Requests to `generate`: stops, seeds, penalties, and errors. The output of the three modes is tested in promises/."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ease import EaseError, Policy, StandardTransformer, generate
from ease.devices import free_memory
from ease.generation.decode import bytes_per_token
from ease.generation.request import Token
from ease.model_config import RopeScaling

Make = Callable[..., StandardTransformer]
PROMPTS, LENGTH = 5, 12


def prompts(vocab: int = 256, rows: int = PROMPTS) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths, some padded on the left, some on the right."""
    ids, mask = torch.randint(vocab, (rows, 9)), torch.ones(rows, 9, dtype=torch.bool)
    for row in range(rows):
        missing = int(torch.randint(8, ()))
        mask[row, : missing if row % 2 else 0] = False
        mask[row, 9 - missing if row % 2 == 0 else 9 :] = False
    return ids, mask


class Wrapped(torch.nn.Linear):
    """A projection plus a second term, as LoRA adds one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


def test_decoding_runs_a_wrapped_projection(tiny: Make) -> None:
    model, (ids, mask) = tiny(3, sharp=True).double(), prompts()
    plain = generate(model, ids, LENGTH, attention_mask=mask).tokens
    wrapped = Wrapped(32, 32, bias=False).double()
    wrapped.load_state_dict(model.layers[1].attention.q_proj.state_dict())
    model.layers[1].attention.q_proj = wrapped
    generated = generate(model, ids, LENGTH, attention_mask=mask).tokens
    assert not torch.equal(generated, plain)
    for row, answer in enumerate(generated):
        text = torch.cat([ids[row][mask[row]], answer])[None]
        assert torch.equal(model(text[:, :-1])[0, -LENGTH:].argmax(-1), answer)


def test_only_remaining_rows_run_the_deeper_layers(tiny: Make) -> None:
    """The deeper layers' feed-forward runs only for rows that have not left."""
    model, (ids, mask) = tiny(4, sharp=True), prompts()
    model.policy = Policy.of(2, 0.3)
    entered: list[int] = []
    model.layers[3].ffn.register_forward_hook(lambda m, i, out: entered.append(i[0].shape[-2]))
    generated = generate(model, ids, LENGTH, "routed", attention_mask=mask)
    deep = int(generated.exits[:, 1:].eq(4).sum())
    assert 0 < deep < generated.exits[:, 1:].numel()
    steps = entered[1:] if len(entered) > deep or entered[0] > PROMPTS else entered
    assert max(steps) <= PROMPTS
    assert generated.stats["layers_per_token"] < 4
    assert generate(model, ids, LENGTH, attention_mask=mask).stats["layers_per_token"] == 4


@pytest.mark.parametrize("mode", ["full", "routed", "exact"])
def test_a_row_ends_at_its_stop_while_others_continue(mode: Any, tiny: Make) -> None:
    model, (ids, mask) = tiny(3, sharp=True).double(), prompts()
    model.policy = Policy.of(1, 0.2)
    options = {"attention_mask": mask} | ({"draft_exit": 1} if mode == "exact" else {})
    free = generate(model, ids, LENGTH, mode, **options)
    stop = int(free.tokens[0, 3])
    streamed: list[Token] = []
    generated = generate(model, ids, LENGTH, mode, stop=stop, stream=streamed.append, **options)
    for row in range(PROMPTS):
        hits = free.tokens[row].eq(stop).nonzero().flatten().tolist()
        length = hits[0] + 1 if hits else LENGTH
        assert torch.equal(generated.tokens[row, :length], free.tokens[row, :length])
        assert not generated.tokens[row, length:].any()
        assert not generated.exits[row, length:].any()
        assert [t.token for t in streamed if t.row == row] == generated.tokens[row, :length].tolist()


def test_the_seed_determines_the_sample(tiny: Make) -> None:
    model, (ids, _) = tiny(2, sharp=True), prompts()
    draw = lambda seed: generate(model, ids, 8, temperature=1.0, seed=seed).tokens  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("mode", ["full", "exact"])
def test_a_large_penalty_prevents_repeated_tokens(mode: Any, tiny: Make) -> None:
    model, (ids, mask) = tiny(3, sharp=True).double(), prompts()
    options = {"attention_mask": mask, "repetition_penalty": 1e9}
    generated = generate(model, ids, LENGTH, mode, **options)
    for row in range(PROMPTS):
        text = [*ids[row][mask[row]].tolist(), *generated.tokens[row].tolist()]
        assert len(set(generated.tokens[row].tolist())) == LENGTH
        assert not set(generated.tokens[row].tolist()) & set(text[:-LENGTH])


def test_cache_size_and_reuse_for_another_policy(tiny: Make) -> None:
    model = tiny(3, num_kv_heads=2)
    cache = model.new_cache(2, 10, key="routed at 1")
    stored = sum(t.numel() * t.element_size() for t in (cache.keys, cache.values, cache.states))
    assert stored == 2 * 10 * bytes_per_token(model)
    model.add_draft_brick(torch.arange(9), torch.zeros(9, model.config.dim))
    drafting = model.new_draft_cache(2, 10)
    stored += sum(t.numel() * t.element_size() for t in (drafting.keys, drafting.values, drafting.states))
    assert stored == 2 * 10 * bytes_per_token(model, brick=True)
    limit = bytes_per_token(model) * 10.0
    generate(model, torch.zeros(1, 8, dtype=torch.long), 2, "exact", draft_source="lookup", max_memory=limit)
    for source in ("brick", "auto"):
        with pytest.raises(EaseError, match="use fewer rows, or lower max_new_tokens"):
            generate(model, torch.zeros(1, 8, dtype=torch.long), 2, "exact", draft_source=source, max_memory=limit)
    with pytest.raises(EaseError, match="made for routed at 1, not for full"):
        cache.check("full")
    with pytest.raises(EaseError, match="the cache has 10 places per row, but a row would need 11"):
        model.run(model.embed(torch.zeros(2, 11, dtype=torch.long)), 1, 3, cache=cache)


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"mode": "fast"}, "mode must be full or routed or exact"),
        ({"temperature": -1.0}, "temperature must be 0 or at least 1e-6"),
        ({"temperature": 1e-40}, "temperature must be 0 or at least 1e-6"),
        ({"seed": 10**20}, "seed must be at most"),
        ({"draft_confidence": 0.5}, 'draft_confidence has no effect in mode "full"'),
        ({"mode": "exact", "draft_confidence": math.nan}, r"draft_confidence must lie in \[0, 1\], got nan"),
        ({"mode": "exact", "draft_confidence": 5}, r"draft_confidence must lie in \[0, 1\]"),
        (
            {"mode": "exact", "draft_confidence": 0.5, "draft_source": "none"},
            'draft_confidence has no effect with draft_source "none"',
        ),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_k": 2.5, "temperature": 1.0}, "top_k must be an integer"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_p": "x", "temperature": 1.0}, "top_p must be a number"),
        ({"repetition_penalty": None}, "repetition_penalty must be a number"),
        ({"seed": "x"}, "seed must be an integer"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer"),
        ({"stop": "<eos>"}, "stop must be an integer"),
        ({"stop": ["<eos>"]}, "an element of stop must be an integer"),
        ({"stop": -1}, "an id in stop must be at least 0"),
        ({"max_memory": "1GB"}, "max_memory must be a number"),
        ({"mode": "exact", "draft_exit": "x"}, "draft_exit must be an integer"),
        ({"mode": "exact", "draft_confidence": "x"}, "draft_confidence must be a number"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"mode": "exact", "draft_exit": 3}, r"draft_exit must lie in 1\.\.2, got 3"),
        ({"draft_exit": 1}, 'draft_exit has no effect in mode "full"'),
        ({"top_k": 5}, "top_k, top_p and seed have no effect at temperature 0"),
        ({"mode": "routed"}, "policy has no exits: set model.policy"),
        ({"max_memory": 10.0}, "use fewer rows, or lower max_new_tokens"),
        ({"max_new_tokens": 10**9}, "MB are available: use fewer rows, or lower max_new_tokens"),
        ({"ids": torch.zeros(4, dtype=torch.long)}, r"ids must be integers of shape \(B, T\)"),
        ({"ids": torch.zeros(0, 4, dtype=torch.long)}, "at least one real token"),
        ({"ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one real token"),
        ({"attention_mask": torch.zeros(1, 4)}, "at least one real token"),
        (
            {"attention_mask": torch.ones(1, 5)},
            r"attention_mask must have the shape of the ids, \(1, 4\), got \(1, 5\)",
        ),
        ({"ids": torch.full((1, 4), 999)}, "token ids must lie in"),
    ],
)
def test_invalid_requests_raise_one_sentence(options: dict[str, Any], fix: str, tiny: Make) -> None:
    with pytest.raises(EaseError, match=fix) as error:
        generate(tiny(3), **{"ids": torch.zeros(1, 4, dtype=torch.long), "max_new_tokens": 2} | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"mode": "exact", "draft_exit": 1}])
def test_the_default_dtype_of_torch_has_no_effect(options: dict[str, Any], dtype: torch.dtype, tiny: Make) -> None:
    model, (ids, _) = tiny(3, sharp=True), prompts()
    expected = generate(model, ids, LENGTH, **options).tokens
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(generate(model, ids, LENGTH, **options).tokens, expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_bias_of_a_replaced_head_is_added(tiny: Make) -> None:
    model, (ids, _) = tiny(2), prompts()
    model.output_head = torch.nn.Linear(32, 256)
    with torch.no_grad():
        model.output_head.bias[7] = 1e6
    assert generate(model, ids, 3).tokens.eq(7).all()


def test_drafts_end_where_rotary_positions_would_depend_on_the_length(tiny: Make) -> None:
    """A text that stops within the limit is the same as in full mode, whatever was drafted."""
    scaling = RopeScaling(4.0, original_max_position=12, rope_type="dynamic")
    model, ids = tiny(3, sharp=True, rope_scaling=scaling).double(), torch.randint(256, (1, 8))
    free = generate(model, ids, 5).tokens
    stop = next(int(token) for place, token in enumerate(free[0]) if place and token not in free[0, :place])
    expected = generate(model, ids, 40, stop=stop).tokens
    exact = generate(model, ids, 40, "exact", stop=stop, draft_exit=2, draft_confidence=0.0)
    assert torch.equal(exact.tokens, expected)
    assert exact.stats["drafted"] > 0


def test_exits_that_the_model_does_not_have_draft_nothing(tiny: Make) -> None:
    model = tiny(3)
    model.policy = Policy((3,), (0.5,))
    for source in ("auto", "exit"):
        with pytest.raises(EaseError, match="must lie below the last of the model's 3 layers"):
            generate(model, torch.zeros(1, 4, dtype=torch.long), 2, "exact", draft_source=source)  # type: ignore[arg-type]


def test_too_many_positions_and_nan_logits_raise(tiny: Make) -> None:
    ids, model = torch.zeros(1, 4, dtype=torch.long), tiny(3, max_positions=8)
    assert generate(model, ids, 5).tokens.shape == (1, 5)
    with pytest.raises(EaseError, match="a prompt of 4 tokens and 6 new ones exceed the model's 8 positions"):
        generate(model, ids, 6)
    with torch.no_grad():
        model.layers[1].ffn.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(EaseError, match="NaN"):
        generate(model, ids, 2)


def test_memory_that_torch_has_reserved_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2_000, 70_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 61_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000)
    assert free_memory(torch.device("cuda")) == 62_000
