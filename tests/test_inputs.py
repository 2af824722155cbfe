"""Ids, masks and batches as users have them: results are those of int64 tensors."""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ease
from ease import Batch, DeepSupervisionTransformer, EaseError, Layout, Policy, Trainer
from ease.evaluation.tasks import predict
from ease.inputs import IGNORE, as_ids, as_mask

V = 50

TORCH = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
NUMPY = (np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)


def frozen(array: Any) -> Any:
    array.setflags(write=False)
    return array


FORMS: dict[str, Callable[[Tensor], Any]] = {
    **{str(dtype): lambda ids, dtype=dtype: ids.to(dtype) for dtype in TORCH},
    **{dtype.__name__: lambda ids, dtype=dtype: ids.numpy().astype(dtype) for dtype in NUMPY},
    "lists": lambda ids: ids.tolist(),
    "tuples": lambda ids: tuple(map(tuple, ids.tolist())),
    "list of tensors": lambda ids: list(ids),
    "list of arrays": lambda ids: list(ids.numpy()),
    "read-only array": lambda ids: frozen(ids.numpy().copy()),
}

NOT_IDS: list[Any] = [
    "a text",
    ["a text"],
    b"bytes",
    None,
    3,
    [1, 2, 3],
    [[1, 2], [3]],
    [[1.0, 2.0]],
    [[True, False]],
    torch.zeros(2, 3),
    torch.zeros(2, 3, dtype=torch.bool),
    torch.zeros(3, dtype=torch.long),
    torch.zeros(1, 2, 3, dtype=torch.long),
    np.zeros((2, 3)),
    [[10**30]],
    [[None]],
    object(),
    {"input_ids": [[1, 2]]},
    iter([[1, 2]]),
    {1, 2},
]


@pytest.fixture(scope="module")
def model() -> DeepSupervisionTransformer:
    torch.manual_seed(0)
    model = DeepSupervisionTransformer(V, 16, 2, 2, max_positions=32).eval()
    with torch.no_grad():
        model.output_head.weight *= 30
    model.trained_exits = {1, 2}
    model.policy = Policy((1,), (0.5,))
    return model


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, V, (3, 6))


@given(st.lists(st.lists(st.integers(0, 127), min_size=3, max_size=3), min_size=1, max_size=4))
def test_every_form_of_integers_gives_the_same_ids(rows: list[list[int]]) -> None:
    expected = torch.tensor(rows)
    for name, form in FORMS.items():
        ids = as_ids("ids", form(expected))
        assert ids.dtype == torch.long, name
        assert torch.equal(ids, expected), name


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_use_of_ids_takes_every_form(
    model: DeepSupervisionTransformer, ids: Tensor, form: Callable[[Tensor], Any]
) -> None:
    given, mask = form(ids), torch.ones_like(ids)
    mask[0, :2] = 0
    assert torch.equal(model(given), model(ids))
    assert torch.equal(model.forward_all_layers(given)[0], model.forward_all_layers(ids)[0])
    for a, b in zip(ease.route(model, given, attention_mask=form(mask)), ease.route(model, ids, attention_mask=mask)):
        assert torch.equal(a, b)
    a, b = (ease.generate(model, x, 4, attention_mask=m) for x, m in ((given, form(mask)), (ids, mask)))
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(predict(model, given)[0], predict(model, ids)[0])
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    for batch in ((form(x), form(y)), [form(x), form(y)], Batch(form(x), form(y))):
        assert torch.equal(ease.score(model, [batch]).losses, ease.score(model, [(x, y)]).losses)


def batches_of_every_kind(ids: Tensor) -> dict[str, list[Any]]:
    """Batches with the same tokens to learn from, padding on the right of the first row included."""
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    y = torch.where(mask[:, 1:] > 0, ids[:, 1:], IGNORE)
    padded = torch.cat([y, torch.full((len(y), 1), IGNORE)], 1)
    labels = ids.masked_fill(mask == 0, IGNORE)
    return {
        "Batch": [Batch(ids, padded, layout=Layout.from_attention_mask(mask))],
        "with labels": [{"input_ids": ids, "attention_mask": mask, "labels": labels}],
        "without labels": [{"input_ids": ids.tolist(), "attention_mask": mask.numpy()}],
        "BatchEncoding": [UserDict(input_ids=ids.int(), attention_mask=mask.bool(), token_type_ids=mask * 0)],
    }


@pytest.mark.parametrize("kind", ["with labels", "without labels", "BatchEncoding"])
def test_dictionaries_of_transformers_train_and_score_as_batches_do(ids: Tensor, kind: str) -> None:
    def losses(batches: list[Any]) -> list[float]:
        torch.manual_seed(1)
        model = DeepSupervisionTransformer(V, 16, 2, 2)
        trainer = Trainer(ease.create_deep_supervision_config(2), V)
        optimizer = trainer.create_optimizer(model, 1e-2)
        trained = trainer.train_with_early_stopping(model, batches, batches, optimizer, max_epochs=2, verbose=False)
        return [*trained["train_losses"], *trained["val_losses"], ease.score(model, batches).losses.sum().item()]

    batches = batches_of_every_kind(ids)
    assert losses(batches[kind]) == losses(batches["Batch"])


@pytest.mark.parametrize("kind", ["with labels", "without labels", "BatchEncoding"])
def test_dictionaries_of_transformers_calibrate_and_mine_as_batches_do(
    model: DeepSupervisionTransformer, ids: Tensor, kind: str
) -> None:
    def results(batches: list[Any]) -> Any:
        found = ease.calibrate(model, model.policy, ease.Target("min_agreement", 0.0), batches, batches, batches)
        threshold = ease.compute_confidence_threshold(model, batches, 0.5)
        hard = ease.collect_hard_examples(model, batches, threshold)
        mined = ease.MinedBatches(model, batches, Policy(), 0.5)
        return found.policy, threshold, hard["inputs"].tolist(), mined.hard, mined.total

    batches = batches_of_every_kind(ids)
    assert results(batches[kind]) == results(batches["Batch"])


def test_prompts_from_a_tokenizer_keep_their_mask(model: DeepSupervisionTransformer, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    encoding = UserDict(input_ids=ids, attention_mask=mask)
    assert torch.equal(
        ease.generate(model, encoding, 3).tokens, ease.generate(model, ids, 3, attention_mask=mask).tokens
    )
    assert torch.equal(ease.route(model, encoding).logits, ease.route(model, ids, attention_mask=mask).logits)
    with pytest.raises(EaseError, match="attention_mask is given twice"):
        ease.route(model, encoding, attention_mask=mask)
    for other in ({"labels": ids}, {"input_ids": ids, "labels": ids}, {"input_ids": ids, "pixel_values": ids}, {}):
        with pytest.raises(EaseError, match="a dictionary"):
            ease.generate(model, other, 3)


@pytest.mark.parametrize("wrong", NOT_IDS, ids=lambda wrong: repr(wrong).partition(" at 0x")[0])
def test_what_is_not_ids_is_one_sentence(model: DeepSupervisionTransformer, ids: Tensor, wrong: Any) -> None:
    trainer = Trainer(ease.create_standard_config(2), V)
    optimizer = trainer.create_optimizer(model, 1e-3)
    good = [(ids, ids)]
    uses: list[Callable[[], Any]] = [
        lambda: model(wrong),
        lambda: ease.score(model, [(wrong, ids)]),
        lambda: ease.score(model, [(ids, wrong)]),
        lambda: trainer.compute_loss(model, wrong, ids),
        lambda: trainer.train_epoch(model, [(ids, wrong)], optimizer),
        lambda: trainer.train_with_early_stopping(model, good, [(wrong, ids)], optimizer, verbose=False),
        lambda: ease.calibrate(model, model.policy, ease.Target("min_agreement", 0.0), [(wrong, ids)], good, good),
        lambda: ease.compute_confidence_threshold(model, [(wrong, ids)], 0.5),
    ]
    if not isinstance(wrong, dict):
        uses += [lambda: ease.generate(model, wrong, 2), lambda: ease.route(model, wrong)]
    for use in uses:
        with pytest.raises(EaseError, match=r"integers of shape \(B, T\)") as error:
            use()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", ["text", 3, (), (1,), None, torch.zeros(2, 2, 3).long(), {"x": 1}, {"input_ids": 3}])
def test_what_is_not_a_batch_is_one_sentence(model: DeepSupervisionTransformer, wrong: Any) -> None:
    with pytest.raises(EaseError, match=r"a batch must be \(x, y\)|a dictionary must hold|integers of shape"):
        ease.score(model, [wrong])


@pytest.mark.parametrize("wrong", ["text", [[1, 2, 3]], [[0.5, 1, 1], [1, 1, 1]], [[-math.inf, 0, 0], [0, 0, 0]], 1])
def test_what_is_not_a_mask_is_one_sentence(model: DeepSupervisionTransformer, wrong: Any) -> None:
    ids = torch.ones(2, 3).long()
    for use in (
        lambda: as_mask("attention_mask", wrong, ids),
        lambda: ease.route(model, ids, attention_mask=wrong),
        lambda: ease.generate(model, ids, 2, attention_mask=wrong),
        lambda: ease.score(model, [{"input_ids": ids, "attention_mask": wrong}]),
    ):
        with pytest.raises(EaseError, match="attention_mask must"):
            use()


def test_the_ids_of_a_text_may_be_an_array_or_a_list() -> None:
    ids = torch.arange(13, dtype=torch.int32)
    expected = list(ease.TokenBatches(ids, 4, 1))
    for form in (ids.long(), ids.numpy(), ids.numpy().astype(np.uint16), ids.tolist()):
        for (a, b), (x, y) in zip(ease.TokenBatches(form, 4, 1), expected, strict=True):
            assert torch.equal(a, x)
            assert torch.equal(b, y)
    for wrong in ("text", [[1, 2]], [1.5, 2.5], {"ids": [1]}):
        with pytest.raises(EaseError, match=r"ids must be integers of shape \(T,\)"):
            ease.TokenBatches(wrong, 4, 1)
