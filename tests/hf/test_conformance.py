"""What tools expect of any model of transformers. `transformers_suite.py` runs transformers' own tests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ease
from ease.errors import EaseError
from ease.models import DeepSupervisionTransformer
from ease.routing.forward import route

transformers = pytest.importorskip("transformers")

from ease.hf.model import EaseConfig, EaseForCausalLM  # noqa: E402

V, L = 97, 3


@pytest.fixture
def model() -> EaseForCausalLM:
    """Every exit takes some tokens of most texts."""
    native = DeepSupervisionTransformer(V, 32, L, 4, num_kv_heads=2).double().eval()
    with torch.no_grad():
        native.output_head.weight *= 20
    wrapped = EaseForCausalLM.wrap(native, pad_token_id=0, eos_token_id=None)
    wrapped.set_routing([0.3, 0.4], [1, 2])
    return wrapped


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, V, (3, 12))


def without_routing(model: EaseForCausalLM) -> EaseForCausalLM:
    model.set_routing(0.0)
    return model


# ---------------------------------------------------------------------------------------------------------
# Forward


def test_label_smoothing_scores_the_next_token_as_for_a_stock_model(
    model: EaseForCausalLM, ids: torch.Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    model.float()
    ease.save_pretrained(model.model, tmp_path / "stock")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    losses = []
    for each in (model, stock):
        arguments = transformers.TrainingArguments(
            str(tmp_path / "out"), label_smoothing_factor=0.1, use_cpu=True, report_to=[]
        )
        trainer = transformers.Trainer(each.train(), arguments)
        losses.append(trainer.compute_loss(each, {"input_ids": ids, "labels": ids.clone()}))
    torch.testing.assert_close(*losses)


def test_hidden_states_are_those_of_the_native_layers(model: EaseForCausalLM, ids: torch.Tensor) -> None:
    native = without_routing(model).model
    states = [native.embed(ids)]
    for layer in range(1, L + 1):
        states.append(native.run(states[-1], layer, layer))
    states[-1] = native.exit_norm(states[-1], L)
    model.config.output_hidden_states = True
    for out in (model(ids), model.train()(ids), model.eval()(ids, use_cache=True)):
        for found, expected in zip(out.hidden_states, states, strict=True):
            torch.testing.assert_close(found, expected)
    assert model(ids, output_hidden_states=False).hidden_states is None


def test_the_last_hidden_state_of_a_routed_token_is_what_the_head_reads(
    model: EaseForCausalLM, ids: torch.Tensor
) -> None:
    for use_cache in (False, True):
        out = model(ids, use_cache=use_cache, output_hidden_states=True)
        assert len(out.exits.unique()) > 1
        assert len(out.hidden_states) == L + 1
        torch.testing.assert_close(model.get_output_embeddings()(out.hidden_states[-1]), out.logits)
        kept = out.exits == 1
        assert torch.equal(out.hidden_states[1][kept], out.hidden_states[2][kept]), "a token that left keeps its state"


def test_a_tuple_is_returned_where_the_configuration_asks_for_it(model: EaseForCausalLM, ids: torch.Tensor) -> None:
    expected = model(ids).logits
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], expected)
    assert torch.equal(model(ids, return_dict=True).logits, expected)


@pytest.mark.parametrize("routing", [True, False])
def test_embeddings_as_input_give_what_their_ids_give(model: EaseForCausalLM, ids: torch.Tensor, routing: bool) -> None:
    if not routing:
        without_routing(model)
    embeds, mask = model.get_input_embeddings()(ids), torch.ones_like(ids)
    mask[1, :4] = 0
    for options in ({}, {"attention_mask": mask}, {"use_cache": True}, {"labels": ids}):
        assert torch.equal(model(inputs_embeds=embeds, **options).logits, model(ids, **options).logits)
    for options in ({}, {"num_beams": 3}, {"attention_mask": mask}):
        options = {"max_new_tokens": 5, "do_sample": False} | options
        new = model.generate(inputs_embeds=embeds, **options)
        assert torch.equal(new, model.generate(ids, **options)[:, 12:])
    model.train()
    model(inputs_embeds=embeds, labels=ids).loss.backward()
    assert model.model.embedding.weight.grad.abs().sum() > 0, "a gradient reaches whatever made the embeddings"
    with pytest.raises(EaseError, match="needs a cache"):
        model.generate(inputs_embeds=embeds, max_new_tokens=5)


def test_a_column_of_padding_predicts_as_the_last_token_before_it(model: EaseForCausalLM, ids: torch.Tensor) -> None:
    plain = model(ids[:, :9]).logits[:, -1]
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    for options in ({}, {"logits_to_keep": 2}, {"logits_to_keep": torch.tensor([8, 11, 11])}, {"use_cache": True}):
        logits = model(ids, attention_mask=mask, **options).logits
        torch.testing.assert_close(logits[:, -1], plain)
        torch.testing.assert_close(logits[:, -2], plain)


def test_a_cache_is_returned_by_default_where_gradients_are_off(model: EaseForCausalLM, ids: torch.Tensor) -> None:
    with torch.no_grad():
        first = model(ids[:, :7])
        second = model(ids[:, 7:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), model(ids).logits)
    assert model(ids).past_key_values is None
    model.config.use_cache = False
    with torch.no_grad():
        assert model(ids).past_key_values is None
    assert model.generate(ids, max_new_tokens=2, return_dict_in_generate=True).past_key_values is not None


# ---------------------------------------------------------------------------------------------------------
# The cache


def test_keys_and_values_are_read_by_layer_and_column(model: EaseForCausalLM, ids: torch.Tensor) -> None:
    without_routing(model)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    alone = model(ids[:1, 5:], use_cache=True).past_key_values
    assert len(cache) == L
    for layer, expected in zip(cache.layers, alone.layers, strict=True):
        assert layer.keys.shape == layer.values.shape == (3, 2, 12, 8)
        assert not layer.keys[0, :, :5].any()
        torch.testing.assert_close(layer.keys[:1, :, 5:], expected.keys)
        torch.testing.assert_close(layer.values[:1, :, 5:], expected.values)
    with pytest.raises(EaseError, match="past_key_values"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


def test_a_copied_cache_goes_on_by_itself(model: EaseForCausalLM, ids: torch.Tensor) -> None:
    cache = model(ids, use_cache=True).past_key_values
    expected = model(ids[:, :2], past_key_values=copy.deepcopy(cache)).logits
    assert torch.equal(model(ids[:, :2], past_key_values=cache).logits, expected)


@pytest.mark.parametrize("routing", [True, False])
def test_a_batch_of_chats_goes_on_after_its_rows_ended_at_different_times(
    model: EaseForCausalLM, ids: torch.Tensor, routing: bool
) -> None:
    if not routing:
        without_routing(model)
    free = model.generate(ids, max_new_tokens=8, do_sample=False)[:, 12:]
    ends = [int(free[0, 2]), int(free[1, 4])]
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(ids, max_new_tokens=8, eos_token_id=ends, **options)
    lengths = (first.sequences != 0).sum(1)
    assert len(set(lengths.tolist())) > 1, "rows end at different times"
    chat = torch.cat([first.sequences, torch.randint(1, V, (3, 4))], 1)
    mask = (chat != 0).long()
    fresh = model.generate(chat, attention_mask=mask, max_new_tokens=6, **options)
    cached = model.generate(
        chat, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=6, **options
    )
    assert torch.equal(cached.sequences, fresh.sequences)


def test_a_cached_token_in_the_middle_of_a_row_cannot_become_padding(model: EaseForCausalLM, ids: torch.Tensor) -> None:
    for changed in (4, slice(0, 3)):
        cache = model(ids, use_cache=True).past_key_values
        mask = torch.ones(3, 13, dtype=torch.long)
        mask[1, changed] = 0
        with pytest.raises(EaseError, match="the last tokens of a row may be padding now"):
            model(ids[:, :1], attention_mask=mask, past_key_values=cache)


# ---------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_turned_on_and_off(
    model: EaseForCausalLM, ids: torch.Tensor, reentrant: bool
) -> None:
    runs: list[int] = []
    run = model.model.run
    model.model.run = lambda *args, **options: runs.append(1) or run(*args, **options)  # type: ignore[assignment]

    def gradients() -> list[torch.Tensor | None]:
        runs.clear()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    plain = without_routing(model.train()) and gradients()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_activation_checkpointing
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b)
    assert len(runs) == 2 * L, "every layer runs again in the backward pass"
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    gradients()
    assert len(runs) == 1


def test_exits_below_the_last_get_no_gradient_from_the_loss(model: EaseForCausalLM, ids: torch.Tensor) -> None:
    """The reason for `test_all_params_have_gradient = False` in `transformers_suite.py`."""
    model.train()(ids, labels=ids).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == ["model.exit_norms.0.weight", "model.exit_norms.1.weight"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantized tensor:UserWarning")
def test_a_dynamically_quantized_model_routes_and_generates(model: EaseForCausalLM, ids: torch.Tensor) -> None:
    model.float()
    for quantized in (
        torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}),
        EaseForCausalLM.wrap(torch.ao.quantization.quantize_dynamic(model.model, {torch.nn.Linear}), pad_token_id=0),
    ):
        expected = route(quantized.model, ids)
        torch.testing.assert_close(quantized(ids).logits, expected.logits)
        assert quantized.generate(ids, max_new_tokens=4, do_sample=False).shape == (3, 16)
        assert ease.generate(quantized.model, ids, max_new_tokens=4).tokens.shape == (3, 4)


# ---------------------------------------------------------------------------------------------------------
# Vocabulary, configuration, folders


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [V + 8, V - 8])
def test_a_resized_vocabulary_keeps_the_other_tokens_and_is_saved(tied: bool, rows: int, tmp_path: Path) -> None:
    model = EaseForCausalLM.wrap(DeepSupervisionTransformer(V, 32, L, 4, tie_embeddings=tied).eval())
    ids = torch.randint(0, V - 8, (2, 5))
    before = model(ids).logits
    embedding = model.resize_token_embeddings(rows)
    assert embedding is model.get_input_embeddings()
    kept = min(rows, V)
    torch.testing.assert_close(model(ids).logits[..., :kept], before[..., :kept])
    assert model(torch.tensor([[rows - 1]])).logits.shape == (1, 1, rows)
    assert (model.get_output_embeddings().weight is embedding.weight) == tied
    assert model.config.vocab_size == model.model.config.vocab_size == rows
    model.save_pretrained(tmp_path)
    for back in (EaseForCausalLM.from_pretrained(tmp_path), EaseForCausalLM.wrap(ease.from_pretrained(tmp_path))):
        assert torch.equal(back(ids).logits, model(ids).logits)
    with pytest.raises(EaseError, match=f"token ids must lie in 0..{rows - 1}"):
        model(torch.tensor([[rows]]))


def test_a_configuration_is_made_and_changed_by_stock_names(tmp_path: Path) -> None:
    sizes = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model("ease", **sizes, max_position_embeddings=64)
    assert config.model == {"vocab_size": V, "dim": 32, "num_layers": 2, "num_heads": 4, "max_positions": 64}
    shared = config.model
    config.tie_word_embeddings = True
    assert "tie_embeddings" not in shared, "a dict of the caller does not change"
    model = EaseForCausalLM(config)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    changed = transformers.AutoConfig.from_pretrained(tmp_path, num_hidden_layers=4, use_cache=False)
    assert (changed.num_hidden_layers, changed.use_cache) == (4, False)
    assert EaseForCausalLM(changed).model.num_layers == 4
    with pytest.raises(EaseError, match=r"lacks model\.exit_norms\.2\.weight"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, config=changed)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "set vocab_size"),
        ({"model": {"vocab_size": V, "widht": 8}}, "widht"),
        ({"vocab_size": "many"}, "vocab_size must be an integer"),
    ],
)
def test_a_configuration_that_describes_no_model_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(EaseError, match=message):
        EaseForCausalLM(EaseConfig(**fields))


def test_a_head_that_differs_from_the_embedding_cannot_be_tied_by_an_option(tmp_path: Path) -> None:
    EaseForCausalLM.wrap(DeepSupervisionTransformer(V, 32, 2, 4)).save_pretrained(tmp_path)
    with pytest.raises(EaseError, match="leave out tie_word_embeddings"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lost", ["model.embedding.weight", "model.layers.1.ffn.up_proj.weight"])
def test_a_folder_that_lacks_a_tensor_is_refused_by_name(tmp_path: Path, tied: bool, lost: str) -> None:
    torch.manual_seed(0)
    EaseForCausalLM.wrap(DeepSupervisionTransformer(V, 32, 2, 4, tie_embeddings=tied)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: w for k, w in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    for load in (EaseForCausalLM.from_pretrained, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(EaseError, match=f"lacks {lost}"):
            load(tmp_path)
    model, report = EaseForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert lost in report["missing_keys"]
    found = model.get_parameter(lost)
    assert not found.is_meta
    assert found.std().item() == pytest.approx(weights[lost].std().item(), rel=0.1), "initialized as in a new model"
    assert model(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_a_folder_with_an_unknown_tensor_is_refused_by_name(tmp_path: Path) -> None:
    EaseForCausalLM.wrap(DeepSupervisionTransformer(V, 32, 2, 4)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"model.extra": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(EaseError, match=r"holds model\.extra"):
        EaseForCausalLM.from_pretrained(tmp_path)
