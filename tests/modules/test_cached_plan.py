"""Runs with a cache against runs over whole sequences."""

import pytest
import torch
import torch.nn.functional as F

from ease import EaseError, StandardTransformer
from ease.model_config import AttentionKind
from ease.modules.cached_plan import QUERY_BLOCK
from ease.modules.plan import mix


def read_twice(model: StandardTransformer, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States after 3 layers, of which some tokens leave at layer 1: computed at once, and with a cache in two parts."""
    state = torch.randn(rows, length, model.config.dim, dtype=model.embedding.weight.dtype)
    active = torch.rand(rows, length) < 0.5
    active[0, : length // 2] = False  # a row of which every token leaves
    whole = model.run(model.run(state, 1, 1), 2, 3, active=active)
    cache, parts = model.new_cache(rows, length), []
    for part, part_active in zip(state.split(length // 2, 1), active.split(length // 2, 1), strict=True):
        parts.append(model.run(model.run(part, 1, 1, cache=cache), 2, 3, active=part_active, cache=cache))
    return whole, torch.cat(parts, 1)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_long_text_attends_in_blocks_of_queries(rows: int) -> None:
    model = StandardTransformer(11, 16, 3, 4, num_kv_heads=2).double().eval()
    with torch.no_grad():
        whole, read = read_twice(model, rows, 6 * QUERY_BLOCK)
    torch.testing.assert_close(read, whole, rtol=0, atol=1e-10)


def test_grouped_queries_attend_with_a_kernel_of_another_memory_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory-efficient kernel of CUDA stores its result as (B, width, H, head_dim)."""
    q, k, v = torch.randn(3, 8, 1, 4), torch.randn(3, 2, 9, 4), torch.randn(3, 2, 9, 4)
    expected = mix(AttentionKind(), q, k, v, None)
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *x, **o: attention(*x, **o).transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert torch.equal(mix(AttentionKind(), q, k, v, None), expected)


def test_gradients_flow_through_a_run_with_a_cache() -> None:
    model = StandardTransformer(11, 16, 1, 4)
    state = torch.randn(2, 5, 16)
    model.run(state, 1, 1, cache=model.new_cache(2, 5)).sum().backward()
    assert model.layers[0].ffn.up_proj.weight.grad is not None


def test_layers_that_hold_different_numbers_of_tokens_do_not_run_together() -> None:
    model = StandardTransformer(11, 16, 3, 4).eval()
    cache, state = model.new_cache(2, 5), torch.randn(2, 1, 16)
    model.run(model.run(state, 1, 3, cache=cache), 1, 1, cache=cache)
    for first, last in ((1, 3), (1, 2)):
        cache.cut(torch.tensor([1, 1]))
        model.run(state, 1, 1, cache=cache)
        model.run(state, 1, 1, cache=cache)
        with pytest.raises(EaseError, match=f"layers {first}..{last} of the cache hold different numbers of tokens"):
            model.run(state, first, last, cache=cache)
    # Rows without an active token do not count.
    only_second = torch.tensor([[False], [True]])
    cache = model.new_cache(2, 5)
    lower = model.run(state, 1, 1, cache=cache)
    model.run(lower, 2, 2, active=~only_second, cache=cache)
    model.run(lower, 2, 3, active=only_second, cache=cache)
