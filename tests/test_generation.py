"""Generation: requests, stops, seeds, penalties and what is refused. What the three ways give is in the promises."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ease import EaseError, StandardTransformer, generate
from ease.generation.decode import bytes_per_token
from ease.generation.request import Token
from ease.generation.sampling import Sampling

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
    """A projection with something beside it, as LoRA puts there."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


def test_decoding_runs_what_stands_in_a_projections_place(tiny: Make) -> None:
    model, (ids, mask) = tiny(3, sharp=True).double(), prompts()
    plain = generate(model, ids, LENGTH, attention_mask=mask).tokens
    wrapped = Wrapped(32, 32, bias=False).double()
    wrapped.load_state_dict(model.layers[1].attention.q_proj.state_dict())
    model.layers[1].attention.q_proj = wrapped
    found = generate(model, ids, LENGTH, attention_mask=mask).tokens
    assert not torch.equal(found, plain)
    for row, answer in enumerate(found):
        text = torch.cat([ids[row][mask[row]], answer])[None]
        assert torch.equal(model(text[:, :-1])[0, -LENGTH:].argmax(-1), answer)


def test_a_row_does_not_wait_for_another(tiny: Make) -> None:
    """Only rows still on their way enter the deeper layers' feed-forward."""
    model, (ids, mask) = tiny(4, sharp=True), prompts()
    model.exit_layer, model.routing_threshold = 2, 0.3
    entered: list[int] = []
    model.layers[3].ffn.register_forward_hook(lambda m, i, out: entered.append(i[0].shape[-2]))
    found = generate(model, ids, LENGTH, "routed", attention_mask=mask)
    deep = int(found.exits[:, 1:].eq(4).sum())
    assert 0 < deep < found.exits[:, 1:].numel()
    steps = entered[1:] if len(entered) > deep or entered[0] > PROMPTS else entered
    assert max(steps) <= PROMPTS
    assert found.stats["layers_per_token"] < 4
    assert generate(model, ids, LENGTH, attention_mask=mask).stats["layers_per_token"] == 4


@pytest.mark.parametrize("mode", ["full", "routed", "exact"])
def test_a_row_ends_at_its_stop_and_the_others_go_on(mode: Any, tiny: Make) -> None:
    model, (ids, mask) = tiny(3, sharp=True).double(), prompts()
    model.exit_layer, model.routing_threshold = 1, 0.2
    options = {"attention_mask": mask} | ({"draft_exit": 1} if mode == "exact" else {})
    free = generate(model, ids, LENGTH, mode, **options)
    stop = int(free.tokens[0, 3])
    told: list[Token] = []
    found = generate(model, ids, LENGTH, mode, stop=stop, stream=told.append, **options)
    for row in range(PROMPTS):
        hits = free.tokens[row].eq(stop).nonzero().flatten().tolist()
        length = hits[0] + 1 if hits else LENGTH
        assert torch.equal(found.tokens[row, :length], free.tokens[row, :length])
        assert not found.tokens[row, length:].any()
        assert not found.exits[row, length:].any()
        assert [t.token for t in told if t.row == row] == found.tokens[row, :length].tolist()


def test_sampled_tokens_follow_their_seed(tiny: Make) -> None:
    model, (ids, _) = tiny(2, sharp=True), prompts()
    draw = lambda seed: generate(model, ids, 8, temperature=1.0, seed=seed).tokens  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("mode", ["full", "exact"])
def test_a_penalty_keeps_tokens_from_coming_again(mode: Any, tiny: Make) -> None:
    model, (ids, mask) = tiny(3, sharp=True).double(), prompts()
    options = {"attention_mask": mask, "repetition_penalty": 1e9}
    found = generate(model, ids, LENGTH, mode, **options)
    for row in range(PROMPTS):
        text = [*ids[row][mask[row]].tolist(), *found.tokens[row].tolist()]
        assert len(set(found.tokens[row].tolist())) == LENGTH
        assert not set(found.tokens[row].tolist()) & set(text[:-LENGTH])


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert torch.allclose(Sampling(1.0, top_p=0.6).distribution(logits, None), torch.tensor([[0.625, 0.375, 0.0]]))
    assert torch.allclose(Sampling(1.0, top_p=0.5).distribution(logits, None), torch.tensor([[1.0, 0.0, 0.0]]))


def test_a_cache_says_what_it_takes_and_is_refused_for_another_use(tiny: Make) -> None:
    model = tiny(3, num_kv_heads=2)
    cache = model.new_cache(2, 10, key="routed at 1")
    stored = sum(t.numel() * t.element_size() for t in (cache.keys, cache.values, cache.states))
    assert stored == 2 * 10 * bytes_per_token(model)
    with pytest.raises(EaseError, match="made for routed at 1, not for full"):
        cache.check("full")
    with pytest.raises(EaseError, match="room for 10 tokens a row and 11 came"):
        model.run(model.embed(torch.zeros(2, 11, dtype=torch.long)), 1, 3, cache=cache)


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"mode": "fast"}, "mode must be full or routed or exact"),
        ({"temperature": -1.0}, "temperature must be 0 or at least 1e-6"),
        ({"temperature": 1e-40}, "temperature must be 0 or at least 1e-6"),
        ({"seed": 10**20}, "seed must lie in"),
        ({"draft_confidence": 0.5}, "draft_confidence is for mode exact, and this is full"),
        ({"mode": "exact", "draft_confidence": math.nan}, r"draft_confidence must lie in \[0, 1\], got nan"),
        ({"mode": "exact", "draft_confidence": 5}, r"draft_confidence must lie in \[0, 1\]"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"mode": "exact", "draft_exit": 3}, r"draft_exit must lie in 1\.\.2, got 3"),
        ({"draft_exit": 1}, "draft_exit is for mode exact, and this is full"),
        ({"top_k": 5}, "top_k and top_p choose what is drawn from"),
        ({"mode": "routed"}, "no exits to route at"),
        ({"max_memory": 10.0}, "use fewer rows, or fewer tokens"),
        ({"max_new_tokens": 10**9}, "MB there are: use fewer rows, or fewer tokens"),
        ({"ids": torch.zeros(4, dtype=torch.long)}, r"prompts are integers \(B, T\)"),
        ({"ids": torch.zeros(0, 4, dtype=torch.long)}, "at least one real token"),
        ({"ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one real token"),
        ({"attention_mask": torch.zeros(1, 4)}, "at least one real token"),
        ({"ids": torch.full((1, 4), 999)}, "token ids must lie in"),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(options: dict[str, Any], fix: str, tiny: Make) -> None:
    with pytest.raises(EaseError, match=fix) as error:
        generate(tiny(3), **{"ids": torch.zeros(1, 4, dtype=torch.long), "max_new_tokens": 2} | options)
    assert "\n" not in str(error.value)


def test_what_a_model_cannot_continue_is_told(tiny: Make) -> None:
    ids, model = torch.zeros(1, 4, dtype=torch.long), tiny(3, max_positions=8)
    assert generate(model, ids, 5).tokens.shape == (1, 5)
    with pytest.raises(EaseError, match="4 tokens of a prompt and 6 new ones are more than the 8 positions"):
        generate(model, ids, 6)
    with torch.no_grad():
        model.layers[1].ffn.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(EaseError, match="NaN"):
        generate(model, ids, 2)
