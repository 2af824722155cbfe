"""The native model under the tools of transformers: they give the results of the native model, routed or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ease
from ease.data.tokenizers import train_tokenizer
from ease.errors import EaseError
from ease.models import DeepSupervisionTransformer
from ease.policy import Policy
from ease.routing.forward import route

transformers = pytest.importorskip("transformers")

from ease.hf.model import EaseConfig, EaseForCausalLM  # noqa: E402

V, L = 97, 3


@pytest.fixture
def native() -> DeepSupervisionTransformer:
    model = DeepSupervisionTransformer(V, 32, L, 4, num_kv_heads=2, max_positions=64).eval()
    with torch.no_grad():
        model.output_head.weight *= 20
        for norm in model.exit_norms:
            norm.weight.uniform_(0.5, 1.5)
    model.trained_exits = {1, 2, 3}
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, V, (3, 12))


@pytest.fixture
def routed(
    native: DeepSupervisionTransformer, ids: torch.Tensor, even_policy: Callable[..., Policy]
) -> EaseForCausalLM:
    """A third of the tokens of `ids` leave at each exit."""
    model = EaseForCausalLM.wrap(native, eos_token_id=None, pad_token_id=0)
    policy = even_policy(native, ids, (1, 2))
    model.set_routing(policy.thresholds, policy.exits)
    return model


# ---------------------------------------------------------------------------------------------------------
# Forward


def test_forward_equals_the_native_model_and_routes_only_in_evaluation(
    routed: EaseForCausalLM, native: DeepSupervisionTransformer, ids: torch.Tensor
) -> None:
    expected = route(native, ids)
    out = routed(ids)
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.exits, expected.exits)
    assert len(expected.exits.unique()) == 3
    # A matrix product of fewer rows rounds differently.
    torch.testing.assert_close(routed(ids, logits_to_keep=2).logits, expected.logits[:, -2:])
    torch.testing.assert_close(routed(ids, logits_to_keep=torch.tensor([0, 5])).logits, expected.logits[:, [0, 5]])
    full = native(ids)
    assert torch.equal(routed.train()(ids).logits, full), "training is at full depth"
    routed.eval().set_routing(0.0)
    assert routed(ids).exits is None
    assert torch.equal(routed(ids, logits_to_keep=2).logits, full[:, -2:])
    assert routed(ids, return_dict=False)[0].shape == full.shape


@pytest.mark.parametrize("routing", [True, False])
def test_padding_and_packed_documents_are_kept_apart(routed: EaseForCausalLM, ids: torch.Tensor, routing: bool) -> None:
    if not routing:
        routed.set_routing(0.0)
    plain = routed(ids).logits
    mask = torch.ones(3, 16)
    mask[:, :4] = 0
    left = routed(torch.cat([torch.zeros(3, 4).long(), ids], 1), attention_mask=mask).logits[:, 4:]
    right = routed(torch.cat([ids, torch.zeros(3, 4).long()], 1), attention_mask=mask.flip(1)).logits[:, :12]
    packed = routed(ids.view(1, -1), position_ids=torch.arange(12).repeat(1, 3)).logits.view(3, 12, V)
    for other in (left, right, packed):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)


def test_the_loss_is_that_of_a_stock_model(routed: EaseForCausalLM, ids: torch.Tensor, tmp_path: Path) -> None:
    ease.save_pretrained(routed.model, tmp_path / "stock")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock").train()
    labels = ids.clone()
    labels[0, :5] = -100
    routed.train()
    for more in ({}, {"num_items_in_batch": 50}):
        loss = routed(ids, labels=labels, **more).loss
        torch.testing.assert_close(loss, stock(input_ids=ids, labels=labels, **more).loss)


def test_gradient_checkpointing_changes_no_gradient(routed: EaseForCausalLM, ids: torch.Tensor) -> None:
    routed.train()

    def gradients() -> list[torch.Tensor]:
        routed.zero_grad()
        routed(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in routed.parameters() if p.grad is not None]

    plain, runs = gradients(), []
    run = routed.model.run
    routed.model.run = lambda *args, **options: runs.append(torch.is_grad_enabled()) or run(*args, **options)
    routed.activation_checkpointing_enable()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b)
    assert len(runs) == 2 * L, "every layer runs again in the backward pass"


def test_unsupported_arguments_of_forward_are_refused(routed: EaseForCausalLM, ids: torch.Tensor) -> None:
    with pytest.raises(EaseError, match="output_attentions"):
        routed(ids, output_attentions=True)
    for both in ({}, {"input_ids": ids, "inputs_embeds": torch.ones(3, 12, 32)}):
        with pytest.raises(EaseError, match="give either input_ids"):
            routed(**both)
    with pytest.raises(EaseError, match="position_ids must have the shape"):
        routed(ids, position_ids=torch.arange(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0.9, [1, 3]), "exit_layer 3"), ((1.5, [1]), "routing_threshold"), (([0.1, 0.2], [1]), "one threshold per exit")],
)
def test_a_policy_that_the_model_cannot_follow_is_refused(
    routed: EaseForCausalLM, arguments: tuple[Any, ...], message: str
) -> None:
    before = routed.policy
    with pytest.raises(EaseError, match=message):
        routed.set_routing(*arguments)
    assert routed.policy == before


def test_exits_default_to_those_set_last_then_to_those_trained(native: DeepSupervisionTransformer) -> None:
    model = EaseForCausalLM.wrap(native)
    model.set_routing(0.5)
    assert model.policy == Policy((1, 2), (0.5, 0.5))
    model.set_routing(0.5, 2)
    model.set_routing(0.0)
    model.set_routing(0.7)
    assert model.policy == Policy((2,), (0.7,))
    native.trained_exits, model.config.exits = {3}, []
    with pytest.raises(EaseError, match="name the exits"):
        model.set_routing(0.5)


def test_arguments_of_forward_are_read_in_every_form_or_refused_by_name(
    routed: EaseForCausalLM, ids: torch.Tensor
) -> None:
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = routed(ids, attention_mask=mask, labels=ids)
    for form in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.int):
        out = routed(form(ids), attention_mask=form(mask), labels=form(ids), token_type_ids=mask * 0, use_cache=True)
        torch.testing.assert_close(out.logits, expected.logits)
        torch.testing.assert_close(out.loss, expected.loss)
    for given, message in (
        ({"input_ids": ids, "atention_mask": mask}, "takes no atention_mask"),
        ({"input_ids": ids, "token_type_ids": mask}, "takes no token_type_ids"),
        ({"input_ids": "a text"}, "input_ids must be integers"),
        ({"input_ids": {"input_ids": ids}}, "input_ids must be integers .* a dictionary with input_ids"),
        ({"input_ids": ids, "labels": ids.float()}, "labels must be integers"),
        ({"input_ids": ids, "attention_mask": mask * -1e9}, "attention_mask must hold 1 for tokens"),
        ({"input_ids": ids, "labels": ids[:, :3]}, "labels must have the shape"),
        ({"input_ids": ids, "labels": ids + 10**6}, "token ids must lie in"),
        ({"input_ids": ids, "position_ids": "first"}, "position_ids must be integers"),
        ({"inputs_embeds": [[[0.0]]]}, "inputs_embeds must be a floating-point tensor"),
        ({"inputs_embeds": ids}, "inputs_embeds must be a floating-point tensor"),
        ({"inputs_embeds": torch.zeros(2, 3, 1)}, "inputs_embeds must be a floating-point tensor"),
    ):
        with pytest.raises(EaseError, match=message):
            routed(**given)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    assert torch.equal(routed(ids, position_ids=positions.tolist()).logits, routed(ids, position_ids=positions).logits)
    routed.set_routing(np.float32(0.5), np.array([1]))
    assert routed.policy == Policy((1,), (0.5,))
    with pytest.raises(EaseError, match="routing_threshold must be a list"):
        routed.set_routing("0.5", [1])
    with pytest.raises(EaseError, match="eos_tokens_id is not a field"):
        EaseForCausalLM.wrap(routed.model, eos_tokens_id=1)


# ---------------------------------------------------------------------------------------------------------
# Generate


def by_hand(native: DeepSupervisionTransformer, row: torch.Tensor, steps: int) -> list[int]:
    for _ in range(steps):
        row = torch.cat([row, route(native, row[None]).logits[0, -1].argmax()[None]])
    return row.tolist()


def padded(rows: list[torch.Tensor], left: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows with the given padding on the left and the rest on the right, and their mask."""
    width = max(len(row) + n for row, n in zip(rows, left))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, (row, n) in enumerate(zip(rows, left)):
        ids[i, n : n + len(row)], mask[i, n : n + len(row)] = row, 1
    return ids, mask


@pytest.fixture
def batch(ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Rows, and their batch: one without padding, one padded on the left, one on the right, one on both sides."""
    rows = [ids[0], ids[1][4:], ids[2][3:], ids[1][7:]]
    return rows, *padded(rows, [0, 4, 0, 3])


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_is_routed_greedy_decoding_for_every_row_whatever_the_padding(
    routed: EaseForCausalLM, native: DeepSupervisionTransformer, batch: Any, use_cache: bool
) -> None:
    routed.double()
    rows, ids, mask = batch
    out = routed.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=use_cache)
    assert [o[12:] for o in out.tolist()] == [by_hand(native, row, 6)[len(row) :] for row in rows]
    exits = route(native, out, attention_mask=torch.cat([mask, torch.ones(4, 6)], 1)).exits
    for layer in (1, 2, 3):
        assert 0.1 <= (exits == layer).sum() / (exits > 0).sum() <= 0.9
    routed.set_routing(0.0)
    assert not torch.equal(routed.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), out)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "drawn beams": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "stopping": {"eos_token_id": list(range(0, V, 5))},
    "guidance": {"guidance_scale": 1.5},
    "penalty": {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("routing", [True, False])
def test_the_cache_reads_every_token_once_and_changes_no_result(
    routed: EaseForCausalLM, batch: Any, options: dict[str, Any], routing: bool
) -> None:
    routed.double()
    if not routing:
        routed.set_routing(0.0)
    _, ids, mask = batch
    results, widths = [], []

    def note(_: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        widths.append((kwargs["input_ids"] if not args else args[0]).shape[1])
        assert (out.exits is not None) == routing
        if routing:
            assert out.exits.shape[1] == widths[-1], "those of the tokens that came"

    routed.register_forward_hook(note, with_kwargs=True)
    for use_cache in (True, False):
        widths.clear()
        torch.manual_seed(0)
        results.append(
            routed.generate(ids, attention_mask=mask, max_new_tokens=8, use_cache=use_cache, **options).tolist()
        )
        assert set(widths[2:]) == {1} if use_cache else max(widths) > 12
    assert results[0] == results[1]
    assert len(results[0]) == 4 * options.get("num_return_sequences", 1)


@pytest.mark.parametrize("routing", [True, False])
def test_parts_read_with_a_cache_give_the_logits_and_exits_of_the_whole(
    routed: EaseForCausalLM, batch: Any, routing: bool
) -> None:
    routed.double()
    if not routing:
        routed.set_routing(0.0)
    _, ids, mask = batch
    whole, real = routed(ids, attention_mask=mask), mask.bool()
    for cuts in ([5, 12], [1, 2, 3, 11, 12]):  # the cache must grow, several times
        cache, parts, start = None, [], 0
        for end in cuts:
            seen = {"attention_mask": mask[:, :end], "past_key_values": cache}
            out = routed(ids[:, start:end], use_cache=True, position_ids=(mask.cumsum(1) - 1)[:, start:end], **seen)
            cache, start = out.past_key_values, end
            parts.append(out)
            assert cache.get_seq_length() == end
        torch.testing.assert_close(torch.cat([part.logits for part in parts], 1)[real], whole.logits[real])
        if routing:
            assert torch.equal(torch.cat([part.exits for part in parts], 1), whole.exits)
    assert routed(ids).past_key_values is None


@pytest.mark.parametrize("routing", [True, False])
def test_cropping_reordering_and_resetting_equal_reading_anew(
    routed: EaseForCausalLM, batch: Any, routing: bool
) -> None:
    routed.double()
    if not routing:
        routed.set_routing(0.0)
    _, ids, mask = batch
    mask[:, 4:9] = 1
    cache = None
    for t in range(9):  # one at a time, so that tokens that leave have no keys and values in deeper layers yet
        seen = {"attention_mask": mask[:, : t + 1], "past_key_values": cache}
        cache = routed(ids[:, t : t + 1], use_cache=True, **seen).past_key_values

    def continue_from(rows: list[int], columns: int, more: torch.Tensor) -> None:
        seen = torch.cat([mask[rows, :columns], torch.ones(more.shape)], 1)
        out = routed(more, attention_mask=seen, past_key_values=cache)
        whole = routed(torch.cat([ids[rows, :columns], more], 1), attention_mask=seen)
        torch.testing.assert_close(out.logits, whole.logits[:, columns:])
        assert not routing or torch.equal(out.exits, whole.exits[:, columns:])
        cache.crop(-more.shape[1])

    cache.crop(0)
    cache.crop(-1)
    owed = cache.native.length - cache.native.filled[-1]
    assert not routing or len(set(owed[:3].tolist())) > 1
    more = torch.randint(0, V, (4, 3))
    cache.reorder_cache(torch.tensor([2, 0, 1, 0]))
    continue_from([2, 0, 1, 0], 8, more)
    cache.native.grow(99)
    continue_from([2, 0, 1, 0], 8, more)
    cache.batch_select_indices(torch.tensor([3, 1]))
    cache.batch_repeat_interleave(2)
    continue_from([0, 0, 0, 0], 8, torch.randint(0, V, (4, 2)))
    cache.reset()
    continue_from([0, 0, 0, 0], 0, torch.randint(0, V, (4, 3)))


def test_chunks_of_a_prompt_and_later_texts_share_one_cache(routed: EaseForCausalLM, batch: Any) -> None:
    routed.double()
    rows, _, _ = batch
    ids, mask = padded(rows, [12 - len(row) for row in rows])
    options = {"attention_mask": mask, "do_sample": False, "return_dict_in_generate": True}
    plain = routed.generate(ids, max_new_tokens=12, **options)
    chunked = routed.generate(ids, max_new_tokens=12, prefill_chunk_size=3, **options)
    assert torch.equal(chunked.sequences, plain.sequences)
    first = routed.generate(ids, max_new_tokens=5, **options)
    options["attention_mask"] = torch.cat([mask, torch.ones(4, 5, dtype=torch.long)], 1)
    second = routed.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=7, **options)
    assert torch.equal(second.sequences, plain.sequences)
    assert second.past_key_values.get_seq_length() == 12 + 12 - 1, "the last token is not read"


@pytest.mark.parametrize("routing", [True, False])
@pytest.mark.parametrize("helper", ["assistant", "itself", "lookup"])
def test_assisted_decoding_changes_no_token(
    routed: EaseForCausalLM, ids: torch.Tensor, helper: str, routing: bool
) -> None:
    routed.double()
    if not routing:
        routed.set_routing(0.0)
    small = EaseForCausalLM.wrap(DeepSupervisionTransformer(V, 16, 1, 2).double().eval(), pad_token_id=0)
    help = {
        "assistant": {"assistant_model": small},
        "itself": {"assistant_model": routed},
        "lookup": {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1},
    }[helper]
    prompt, widths = torch.cat([ids[:1], ids[:1]], 1), []
    plain = routed.generate(prompt, max_new_tokens=12, do_sample=False)
    routed.register_forward_hook(lambda _, a, kwargs, o: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    assert torch.equal(routed.generate(prompt, max_new_tokens=12, do_sample=False, **help), plain)
    assert any(1 < width < 12 for width in widths), "candidates are read together"


def test_in_training_mode_there_is_no_cache(routed: EaseForCausalLM, ids: torch.Tensor) -> None:
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    cache = routed.generate(ids, **options).past_key_values
    routed.train()
    assert routed(ids, use_cache=True).past_key_values is None
    assert routed.generate(ids, **options).past_key_values is None
    with pytest.raises(EaseError, match="evaluation mode"):
        routed(ids, past_key_values=cache)


def test_a_cache_is_refused_for_other_rows_positions_and_policies(routed: EaseForCausalLM, batch: Any) -> None:
    _, ids, mask = batch

    def cache() -> Any:
        return routed(ids, attention_mask=mask, use_cache=True).past_key_values

    new = torch.zeros(4, 1, dtype=torch.long)
    seen = torch.cat([mask, torch.ones(4, 1)], 1)
    routed(new, past_key_values=cache(), attention_mask=seen)
    for refused, message in (
        ({"past_key_values": transformers.DynamicCache()}, "got DynamicCache"),
        ({"past_key_values": cache(), "attention_mask": torch.ones(4, 1)}, r"attention_mask \(4, 13\)"),
        ({"past_key_values": cache(), "attention_mask": torch.ones(4, 13)}, "whose first 12 columns are unchanged"),
        ({"past_key_values": cache(), "position_ids": torch.zeros(4, 1).long()}, "leave position_ids out"),
    ):
        with pytest.raises(EaseError, match=message):
            routed(new, **refused)
    with pytest.raises(EaseError, match="ids of 4 rows"):
        routed(new[:2], past_key_values=cache())
    with pytest.raises(EaseError, match="cache_implementation"):
        routed.generate(ids, attention_mask=mask, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(EaseError, match="on the left"):
        routed.generate(ids, attention_mask=mask, max_new_tokens=2, prefill_chunk_size=3)
    old = cache()
    routed.set_routing(0.5)
    with pytest.raises(EaseError, match="make a new one"):
        routed(new, past_key_values=old, attention_mask=seen)


def test_under_autocast_the_cache_changes_no_token(routed: EaseForCausalLM, ids: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for threshold in (routed.policy.thresholds, 0.0):
            routed.set_routing(threshold)
            out = [routed.generate(ids, max_new_tokens=3, do_sample=False, use_cache=c) for c in (True, False)]
            assert torch.equal(*out)


def test_beams_sampling_and_stopping_are_transformers_own(
    routed: EaseForCausalLM, ids: torch.Tensor, tmp_path: Path
) -> None:
    routed.set_routing(0.0)
    ease.save_pretrained(routed.model, tmp_path / "stock")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    third = int(routed.generate(ids, max_new_tokens=3, do_sample=False)[0, -1])
    for options in ({"num_beams": 3}, {"do_sample": True}, {"eos_token_id": third}):
        results = []
        for model in (routed, stock):
            torch.manual_seed(0)  # for the sampling
            results.append(model.generate(ids, max_new_tokens=6, pad_token_id=0, **options).tolist())
        assert results[0] == results[1], options


def test_stock_early_exit_works_on_an_export_and_is_refused_here(
    routed: EaseForCausalLM, ids: torch.Tensor, tmp_path: Path
) -> None:
    ease.save_pretrained(routed.model, tmp_path / "stock")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = stock.generate(ids[:1], **options)
    assert torch.equal(stock.generate(ids[:1], assistant_early_exit=1, **options), plain), "it is exact"
    with pytest.raises(EaseError, match="set_routing"):
        routed.generate(ids[:1], assistant_early_exit=1, **options)
    with pytest.raises(EaseError, match="set_routing"):
        routed.generate(ids[:1], transformers.GenerationConfig(assistant_early_exit=1))
    assert routed.config.num_hidden_layers == L


# ---------------------------------------------------------------------------------------------------------
# Saving, the Auto classes, pipelines


@pytest.mark.parametrize("tied", [True, False])
def test_saving_and_loading_through_the_auto_classes_keeps_weights_and_policy(tmp_path: Path, tied: bool) -> None:
    native = DeepSupervisionTransformer(V, 32, L, 4, tie_embeddings=tied).eval()
    native.trained_exits = {1, 3}
    model = EaseForCausalLM.wrap(native, eos_token_id=1)
    model.set_routing(0.02, [1])
    model.save_pretrained(tmp_path)
    assert isinstance(transformers.AutoConfig.from_pretrained(tmp_path), EaseConfig)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(back) is EaseForCausalLM
    assert (back.model.output_head.weight is back.model.embedding.weight) == tied
    for other in (back.model, ease.from_pretrained(tmp_path), EaseForCausalLM.from_pretrained(tmp_path).model):
        assert all(torch.equal(a, b) for a, b in zip(native.parameters(), other.parameters(), strict=True))
        assert (other.config, other.trained_exits) == (native.config, {1, 3})
        assert other.policy == Policy((1,), (0.02,))
    assert back.generation_config.eos_token_id == 1


def test_a_fresh_config_makes_a_model_with_native_initial_values() -> None:
    torch.manual_seed(0)
    native = DeepSupervisionTransformer(V, 32, 2, 4)
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(EaseForCausalLM.wrap(native).config)
    assert all(torch.equal(a, b) for a, b in zip(native.parameters(), made.model.parameters(), strict=True))


def test_an_export_loads_with_its_exits_and_generation_settings(routed: EaseForCausalLM, tmp_path: Path) -> None:
    tokenizer = train_tokenizer("byte", [])
    native = DeepSupervisionTransformer(tokenizer.get_vocab_size(), 32, 2, 4, exit_layer=1, routing_threshold=0.5)
    ease.save_pretrained(native, tmp_path / "out", tokenizer=tokenizer)
    model = EaseForCausalLM.from_pretrained(tmp_path / "out", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    for options, message in (
        ({"load_in_8bit": True}, "load_in_8bit is not an option"),
        ({"torch_dtype": "f99"}, "f99"),
    ):
        with pytest.raises(EaseError, match=message):
            EaseForCausalLM.from_pretrained(tmp_path / "out", **options)
    assert model.policy == Policy((1,), (0.5,))
    assert (model.config.eos_token_id, model.generation_config.eos_token_id, model.config.pad_token_id) == (1, 1, 0)

    pipe = transformers.pipeline(
        "text-generation", model=model, tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    )
    prompts, options = ["import json", "def f", "x"], {"max_new_tokens": 4, "do_sample": False}
    texts = [pipe(prompt, **options)[0]["generated_text"] for prompt in prompts]
    assert texts[0].startswith("import json")
    for together in ({"batch_size": 3}, {"batch_size": 3, "use_cache": False}):
        assert [text[0]["generated_text"] for text in pipe(prompts, **options, **together)] == texts


# ---------------------------------------------------------------------------------------------------------
# Trainer and LoRA


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Eight rows that count upwards: learned in a few steps."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = torch.arange(i, i + 10)
        return {"input_ids": row, "labels": row}


def training(folder: Path, **options: Any) -> Any:
    return transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
        **{"max_steps": 20, "save_strategy": "no"} | options,
    )


def test_the_trainer_trains_evaluates_routed_and_resumes(
    routed: EaseForCausalLM, native: DeepSupervisionTransformer, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "activation_checkpointing": True}
    trainer = transformers.Trainer(routed, training(tmp_path, **options), train_dataset=Rows(), eval_dataset=Rows())
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before
    native.eval()
    rows = torch.stack([Rows()[i]["input_ids"] for i in range(8)])
    loss = torch.nn.functional.cross_entropy(route(native, rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert after == pytest.approx(loss.item(), rel=1e-4), "evaluation is routed"

    saved = ease.from_pretrained(tmp_path / "checkpoint-4")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), native.parameters(), strict=True))
    assert saved.policy == native.policy
    fresh = EaseForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    resumed = transformers.Trainer(fresh, training(tmp_path, **options), train_dataset=Rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for a, b in zip(fresh.parameters(), native.parameters(), strict=True):
        torch.testing.assert_close(a, b)


# peft reads a name that transformers 5 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora_trains_saves_and_merges(
    routed: EaseForCausalLM, native: DeepSupervisionTransformer, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    weights = {name: p.clone() for name, p in native.named_parameters()}
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    model = peft.get_peft_model(routed, config)
    rows = torch.stack([Rows()[i]["input_ids"] for i in range(8)])
    before = model.eval()(rows, labels=rows).loss
    transformers.Trainer(model, training(tmp_path), train_dataset=Rows()).train()
    model.eval()
    assert model(rows, labels=rows).loss < before
    assert model(rows).exits is not None, "LoRA leaves the routing on"
    assert all(
        torch.equal(weights[n.replace(".base_layer", "")], p) for n, p in native.named_parameters() if "lora" not in n
    )
    logits, generated = model(rows).logits, model.generate(rows[:, :5], max_new_tokens=3)

    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    assert type(merged) is EaseForCausalLM
    torch.testing.assert_close(merged(rows).logits, logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(merged.generate(rows[:, :5], max_new_tokens=3), generated)
    config_json = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(config_json["target_modules"]) == {"q_proj", "v_proj"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_generate_follows_lora_as_it_is_switched_merged_and_unloaded(
    routed: EaseForCausalLM, ids: torch.Tensor
) -> None:
    peft = pytest.importorskip("peft")
    routed.double()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False
    )
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}

    def generated(model: Any) -> list[list[int]]:
        with_cache, without = (model.generate(input_ids=ids, use_cache=c, **options).tolist() for c in (True, False))
        assert with_cache == without
        return with_cache

    base = generated(routed)
    model = peft.get_peft_model(routed, config, adapter_name="one")
    model.add_adapter("two", config)
    model.double().eval()
    a = generated(model)
    model.set_adapter("two")
    b = generated(model)
    assert base != a != b != base
    with model.disable_adapter():
        assert generated(model) == base
    model.set_adapter("one")
    assert generated(model) == a
    model.merge_adapter()
    assert generated(model) == a
    model.unmerge_adapter()
    model.set_adapter("two")
    assert generated(model) == b
    routed.set_routing(0.0)
    b = generated(model)
    model.set_adapter("one")
    a = generated(model)
    mixed = model.generate(input_ids=ids, adapter_names=["one", "two", "one"], **options).tolist()
    assert mixed == [a[0], b[1], a[2]]
    assert generated(model.merge_and_unload()) == a
