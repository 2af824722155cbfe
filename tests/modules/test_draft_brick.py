"""The draft brick: what it computes token by token, in a round of drafts, and in whole passes."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ease import EaseError, StandardTransformer, generate
from ease.interface import Layout

Make = Callable[..., StandardTransformer]

OTHER_FAMILIES = {
    "num_kv_heads": 2,
    "window": 3,
    "windowed_layers": (1, 2),
    "local_rope_theta": 100.0,
    "post_norms": True,
    "norm_offset": True,
    "qk_norm": True,
    "logit_softcap": 5.0,
    "logit_divisor": 2.0,
    "embedding_scale": 3.0,
}


@pytest.fixture(params=[{}, OTHER_FAMILIES], ids=["llama", "others"])
def model(request: pytest.FixtureRequest, tiny: Make) -> StandardTransformer:
    return tiny(2, draft_brick=True, draft_vocabulary=100, sharp=True, **request.param).double()


def states_and_next(model: StandardTransformer, rows: int = 2, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """States h_t of the last layer, and the tokens x_{t+1} that follow."""
    ids = torch.randint(256, (rows, length + 1))
    return model.forward_to_layer(ids[:, :-1], model.num_layers), ids[:, 1:]


@torch.no_grad()
def test_token_by_token_with_a_cache_equals_the_whole_pass(model: StandardTransformer) -> None:
    states, ids = states_and_next(model)
    whole = model.draft(states, ids)
    assert whole.shape == states.shape
    cache = model.new_draft_cache(2, 9)
    steps = [model.draft(states[:, :4], ids[:, :4], cache=cache)]
    steps += [model.draft(states[:, [t]], ids[:, [t]], cache=cache) for t in range(4, 9)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-10)
    # Rows in different places: what is cut is read again, by the rows that lack it.
    cache.cut(torch.tensor([5, 8]))
    lacks = Layout(torch.zeros(2, 4, dtype=torch.long), torch.tensor([[0, 0, 0, 0], [-1, -1, -1, 0]]))
    again = model.draft(states[:, 5:], ids[:, 5:], layout=lacks, cache=cache)
    torch.testing.assert_close(again[lacks.real], whole[:, 5:][lacks.real], rtol=0, atol=1e-10)
    assert cache.length.tolist() == [9, 9]


@torch.no_grad()
def test_a_chain_is_what_rounds_of_drafts_compute_at_every_place(model: StandardTransformer) -> None:
    states, ids = states_and_next(model)
    first, second, third = model.draft_brick.chain(states, model.embed(ids), 3)
    torch.testing.assert_close(first, model.draft(states, ids), rtol=0, atol=1e-10)
    for start in range(7):  # the first draft of a round is at `start`, and reads the last real state
        cache = model.new_draft_cache(2, 9)
        g = model.draft(states[:, : start + 1], ids[:, : start + 1], cache=cache)[:, -1:]
        for draft in (second, third):
            at = start + (1 if draft is second else 2)
            g = model.draft(g, ids[:, [at]], cache=cache)
            torch.testing.assert_close(g[:, 0], draft[:, at], rtol=0, atol=1e-10)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other_in_a_chain(model: StandardTransformer) -> None:
    states, ids = states_and_next(model, rows=1)
    layout = Layout(torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), torch.tensor([[0] * 4 + [1] * 5]))
    packed = model.draft_brick.chain(states, model.embed(ids), 3, layout)
    alone = model.draft_brick.chain(states[:, 4:], model.embed(ids[:, 4:]), 3)
    for k, (one, other) in enumerate(zip(packed, alone)):
        torch.testing.assert_close(one[:, 4 + k :], other[:, k:], rtol=0, atol=1e-10)


@torch.no_grad()
def test_tokens_come_from_the_trimmed_vocabulary(model: StandardTransformer) -> None:
    chosen = torch.randperm(256)[:40]
    model.add_draft_brick(chosen, torch.randn(9, 32).double())
    assert model.config.draft_vocabulary == 40
    g = model.draft(*states_and_next(model))
    tokens, confidences = model.draft_tokens(g)
    every = model.head_logits(model.draft_brick.normed(g))  # the whole head, with its soft cap
    torch.testing.assert_close(model.draft_logits(g), every[..., chosen])
    assert torch.equal(tokens, chosen[every[..., chosen].argmax(-1)])
    torch.testing.assert_close(confidences, every[..., chosen].softmax(-1).amax(-1))
    model.output_head.weight.mul_(-1)
    torch.testing.assert_close(model.draft_logits(g), -every[..., chosen])  # the copy of the head's rows is current
    assert model.float().draft_logits(g.float()).dtype == torch.float32


@torch.no_grad()
def test_a_model_is_stored_and_copied_after_its_brick_has_drafted(model: StandardTransformer) -> None:
    g = model.draft(*states_and_next(model))
    expected = model.draft_logits(g)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.draft_logits(g), expected)


@pytest.mark.filterwarnings("ignore")
def test_a_brick_drafts_with_a_quantized_head(tiny: Make) -> None:
    model = tiny(2, draft_brick=True, draft_vocabulary=100, sharp=True, logit_softcap=5.0)
    model.output_head = torch.ao.quantization.quantize_dynamic(nn.Sequential(model.output_head), {nn.Linear})[0]
    g = torch.randn(2, 3, 32)
    with torch.no_grad():
        every = model.head_logits(model.draft_brick.normed(g))
        torch.testing.assert_close(model.draft_logits(g), every[..., :100])
    ids = torch.randint(256, (2, 5))
    assert generate(model, ids, 6, "exact", draft_source="brick", draft_confidence=0.0).stats["drafted"] > 0


@torch.inference_mode()
def test_a_model_made_in_inference_mode_drafts(tiny: Make) -> None:
    model = tiny(2, draft_brick=True)
    ids = torch.randint(256, (2, 5))
    assert generate(model, ids, 6, "exact", draft_source="brick", draft_confidence=0.0).stats["drafted"] > 0


@pytest.mark.parametrize("least", [0.0, 0.1, None])
def test_a_brick_that_overflows_changes_no_token(least: float | None, tiny: Make) -> None:
    model, ids = tiny(2, draft_brick=True), torch.randint(256, (2, 5))
    with torch.no_grad():
        model.draft_brick.fuse.weight[0, 0] = torch.nan
    generated = generate(model, ids, 6, "exact", draft_source="brick", draft_confidence=least)
    assert torch.equal(generated.tokens, generate(model, ids, 6).tokens)


def test_the_brick_is_ignored_by_all_that_does_not_ask_for_it(tiny: Make) -> None:
    model, plain = tiny(2, draft_brick=True), tiny(2)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("draft_brick.")})
    ids = torch.randint(256, (2, 5))
    assert all(map(torch.equal, model.forward_all_layers(ids), plain.forward_all_layers(ids)))
    for first in (1, 3):
        model.freeze_below(first)
        assert not any(p.requires_grad for p in model.draft_brick.parameters())


@torch.no_grad()
def test_a_new_brick_sees_every_dimension_of_the_states_in_equal_size(model: StandardTransformer) -> None:
    states = torch.randn(400, 32).double() * torch.logspace(-1, 1, 32)
    model.add_draft_brick(torch.arange(10), states)
    brick = model.draft_brick
    assert brick.state_norm(states).square().mean(0).tolist() == pytest.approx([1.0] * 32, rel=1e-3)
    normed = brick.normed(brick.norm(torch.ones(32).double()))  # and gives it back in the size that the head expects
    expected = model.exit_norm(states, 2).square().mean(0).sqrt()
    torch.testing.assert_close(normed.abs(), expected, rtol=1e-3, atol=0)


def test_growth_drops_the_brick(tiny: Make) -> None:
    model = tiny(2)
    with pytest.raises(EaseError, match="has no draft brick: train one"):
        model.draft_tokens(torch.zeros(1, 32))
    model.add_draft_brick(torch.arange(10), torch.randn(5, 32))
    with pytest.warns(UserWarning, match="reads the states of layer 2 and is dropped"):
        model.grow(3)
    assert model.draft_brick is None
    assert not model.config.draft_brick


@pytest.mark.parametrize(("shape", "vocabulary"), [({"vocab_size": 32_768}, 32_768), ({"vocab_size": 32_769}, 16_384)])
def test_the_vocabulary_is_trimmed_where_it_is_large(shape: dict[str, int], vocabulary: int) -> None:
    from ease import ModelConfig

    assert ModelConfig(**shape, draft_brick=True).draft_vocabulary == vocabulary
    assert ModelConfig(**shape).draft_vocabulary is None


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"draft_vocabulary": 5}, "set draft_brick as well"),
        ({"draft_brick": True, "draft_vocabulary": 257}, "the model has 256 tokens"),
        ({"draft_brick": True, "draft_vocabulary": 0}, "draft_vocabulary must be at least 1"),
        ({"draft_brick": True, "num_labels": 3}, "a classifier generates no text"),
    ],
)
def test_bad_shapes_are_refused_in_one_sentence(options: dict[str, int], fix: str) -> None:
    with pytest.raises(EaseError, match=fix) as error:
        StandardTransformer(256, **options)
    assert "\n" not in str(error.value)
