"""Products in oneDNN's layout: the numbers of `F.linear`, of the weight as it is now."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ease import generate
from ease.modules import products
from ease.modules.cached_plan import AlignedPlan
from ease.modules.products import inference_product, packed_product

WEIGHT = 300, 200
EVEN_SMALL = 1  # in place of MIN_PRODUCT: products of this model are small


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every product in oneDNN's layout, which small products use, too."""
    if not products.supported(torch.zeros(2, 2)):
        pytest.skip("this build of torch has no oneDNN")
    seen: list[int] = []

    def counted(x: Tensor, *rest: Any) -> Tensor:
        seen.append(x.numel() // x.shape[-1])
        return multiply(x, *rest)

    multiply = products.multiply
    monkeypatch.setattr(products, "multiply", counted)
    monkeypatch.setattr(products, "MIN_PRODUCT", EVEN_SMALL)
    return seen


@pytest.mark.parametrize("shape", [(200,), (1, 200), (7, 200), (2, 3, 200), (0, 200)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_equals_linear(shape: tuple[int, ...], bias: bool, calls: list[int]) -> None:
    weight, x = torch.randn(WEIGHT), torch.randn(shape)
    b = torch.randn(300) if bias else None
    with torch.no_grad():
        torch.testing.assert_close(inference_product(weight, b)(x), F.linear(x, weight, b))
    assert calls == ([x.numel() // 200] if x.numel() else [])


@pytest.mark.parametrize("change", ["in place", "through data", "another tensor in data", "one element"])
def test_a_changed_weight_is_noticed_by_the_next_function(change: str, calls: list[int]) -> None:
    """Merging an adapter writes through `weight.data`, which leaves no trace in the tensor's version."""
    weight, x = nn.Parameter(torch.randn(WEIGHT)), torch.randn(4, 200)
    with torch.no_grad():
        inference_product(weight)(x)
        if change == "in place":
            weight.mul_(2)
        elif change == "through data":
            weight.data += 1
        elif change == "another tensor in data":
            weight.data = torch.randn(WEIGHT)
        else:
            weight.data[123, 45] += 1e-3
        torch.testing.assert_close(inference_product(weight)(x), F.linear(x, weight))
    assert calls == [4, 4]


def test_an_unchanged_weight_is_reordered_once(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, made, reorder = torch.randn(WEIGHT), [], products.reorder
    monkeypatch.setattr(products, "reorder", lambda w: made.append(w) or reorder(w))  # type: ignore[func-returns-value]
    with torch.no_grad():
        for _ in range(3):
            inference_product(weight)(torch.randn(4, 200))
    assert len(made) == 1


def test_the_draws_of_the_user_do_not_depend_on_what_was_reordered(tiny: Callable[..., Any], calls: list[int]) -> None:
    model, ids, samples = tiny(2), torch.randint(256, (3, 5)), []
    for _ in range(2):
        torch.manual_seed(1)
        samples.append(generate(model, ids, 8, temperature=1.0).tokens)
    assert calls
    assert torch.equal(*samples)


def test_gradients_other_dtypes_and_autocast_use_linear(calls: list[int]) -> None:
    weight = nn.Parameter(torch.randn(WEIGHT))
    inference_product(weight)(torch.randn(4, 200)).sum().backward()
    assert weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert inference_product(weight)(torch.randn(4, 200)).dtype == torch.bfloat16
    with torch.no_grad():
        inference_product(weight.double())(torch.randn(4, 200).double())
    assert calls == []


def test_without_memory_for_a_copy_the_stored_weight_is_used(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(WEIGHT), torch.randn(4, 200)
    monkeypatch.setattr(products, "free_memory", lambda device: 3.9 * weight.nbytes)
    with torch.no_grad():
        torch.testing.assert_close(inference_product(weight)(x), F.linear(x, weight))
    assert calls == []


@pytest.mark.parametrize("rows", [1, 2, 30])
def test_packed_layers_give_their_products_side_by_side(rows: int, calls: list[int]) -> None:
    parts, x = [nn.Linear(200, n, bias=False) for n in (30, 10, 20)], torch.randn(rows, 200)
    with torch.no_grad():
        torch.testing.assert_close(packed_product(*parts)(x), torch.cat([part(x) for part in parts], 1))
    assert calls == [rows]


def test_decoding_uses_it_for_the_head_and_leaves_the_model_as_it_is(
    tiny: Callable[..., Any], calls: list[int]
) -> None:
    model, ids = tiny(2), torch.randint(256, (3, 5))
    generate(model.double(), ids, 8)
    assert calls == []
    generate(model.float(), ids, 8)
    assert calls
    assert "forward" not in vars(model.output_head)


@pytest.mark.parametrize("fresh", [1, 3])
@pytest.mark.parametrize("rows", [1, 4])
def test_rows_at_the_same_place_read_the_cache_through_views(fresh: int, rows: int, tiny: Callable[..., Any]) -> None:
    """Also where tokens left below: all rows lack the same places of the deeper layers."""
    model = tiny(4).double()
    ids = torch.randint(256, (rows, 9))
    with torch.no_grad():
        expected = model.forward_to_layer(ids, 4)
        cache = model.new_cache(rows, 9)
        model.run(model.embed(ids[:, : 9 - fresh]), 1, 4, cache=cache)
        state = model.run(model.embed(ids[:, 9 - fresh :]), 1, 4, cache=cache)
        assert isinstance(cache.planned[1], AlignedPlan)
        torch.testing.assert_close(state, expected[:, 9 - fresh :])
        left = model.new_cache(rows, 9)
        state = model.run(model.embed(ids[:, :7]), 1, 2, cache=left)
        state = model.run(model.embed(ids[:, 7:]), 1, 2, cache=left)
        model.run(state, 3, 4, active=torch.tensor([[False, True]] * rows), cache=left)
        assert isinstance(left.planned[1], AlignedPlan)
        assert (left.filled == 9).all()
