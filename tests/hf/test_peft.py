"""What PEFT and TRL ask of a model: the results are those of stock Llama with equal weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ease
from ease.errors import EaseError

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from ease.hf.model import EaseForCausalLM  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),  # PEFT, in `generate`
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.*quantiz.* deprecated"),
]

V, L = 67, 2

NORMS = {"rtol": 1e-3, "atol": 1e-4}  # stock models compute norms in float32


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "stock"
    torch.manual_seed(0)
    shape = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": L}
    config = transformers.LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, head_dim=6, eos_token_id=1)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def native_folder(stock_folder: Path) -> Path:
    folder = stock_folder.with_name("native")
    EaseForCausalLM.from_pretrained(stock_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def stock(stock_folder: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(stock_folder).double()


@pytest.fixture
def model(stock_folder: Path) -> EaseForCausalLM:
    return EaseForCausalLM.from_pretrained(stock_folder).double()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, V, (2, 7))


def median_confidence(model: EaseForCausalLM, ids: torch.Tensor) -> float:
    """A threshold at exit 1 that half the tokens reach."""
    with torch.no_grad():
        state = model.model.run(model.model.embed(ids), 1, 1)
        return float(model.model.logits(state, 1).softmax(-1).amax(-1).median())


# ---------------------------------------------------------------------------------------------------------
# The base model, as TRL calls it


@pytest.mark.parametrize("mode", ["training", "full depth", "routed"])
def test_the_head_on_the_state_of_the_base_model_gives_the_logits(
    model: EaseForCausalLM, ids: torch.Tensor, mode: str
) -> None:
    model.train(mode == "training")
    if mode == "routed":
        model.set_routing(median_confidence(model, ids), [1])
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    out = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    whole = model(ids, attention_mask=mask)
    if mode == "routed":
        assert len(whole.exits[mask.bool()].unique()) == 2
    real = mask.bool()
    torch.testing.assert_close(model.get_output_embeddings()(out.last_hidden_state)[real], whole.logits[real])
    assert out.past_key_values is None
    assert out.hidden_states is None
    assert len(model.base_model(ids, output_hidden_states=True).hidden_states) == L + 1
    assert model.base_model(ids, return_dict=False)[0].shape == (2, 7, 16)


def test_the_base_model_shares_all_parameters_but_the_head(model: EaseForCausalLM, ids: torch.Tensor) -> None:
    model.train().base_model(ids).last_hidden_state.sum().backward()
    assert model.get_output_embeddings().weight.grad is None
    for parameter in model.base_model.parameters():
        parameter.requires_grad = False
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.output_head.weight"]


def test_the_base_model_continues_a_cache(model: EaseForCausalLM, ids: torch.Tensor) -> None:
    whole = model.base_model(ids).last_hidden_state
    first = model.base_model(ids[:, :4], use_cache=True)
    second = model.base_model(ids[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.last_hidden_state, second.last_hidden_state], 1), whole)


def test_a_folder_tells_how_to_load_it_and_stores_each_size_once(native_folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(native_folder)
    assert config.architectures == ["EaseForCausalLM"]
    assert config.auto_map == {}
    fields = config.to_dict()
    assert {name: fields[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")} == {
        "vocab_size": V,
        "hidden_size": 16,
        "num_hidden_layers": L,
    }
    assert [fields[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")] == [4, 2, 6]
    stored = json.loads((native_folder / "config.json").read_text())
    assert stored["model"]["dim"] == 16
    assert not stored.keys() & {"hidden_size", "head_dim", "auto_map"}


# ---------------------------------------------------------------------------------------------------------
# Methods without target modules


def test_every_method_of_peft_with_modules_for_llama_has_the_same_ones_here(model: EaseForCausalLM) -> None:
    from peft.utils import constants

    tables = {
        name: table
        for name, table in vars(constants).items()
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in table
    }
    for table in tables.values():
        table.pop("ease", None)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    assert {name.rsplit(".", 3)[-3] for name, p in adapted.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    assert {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad} == {"q_proj", "v_proj"}
    names = [name for name, _ in EaseForCausalLM(model.config).named_modules()]
    assert len(tables) > 10
    for table in tables.values():
        for module in table["ease"]:
            assert any(name.endswith(f".{module}") for name in names), module


@pytest.mark.parametrize("method", ["lora", "adalora", "ia3", "dora", "all-linear"])
def test_methods_that_change_weights_equal_those_on_stock_llama(
    stock: Any, model: EaseForCausalLM, ids: torch.Tensor, method: str
) -> None:
    configs = {
        "lora": peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False),
        "adalora": peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=1, init_lora_weights=False),
        "ia3": peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False),
        "dora": peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, use_dora=True),
        "all-linear": peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules="all-linear"),
    }
    losses, grads = [], []
    for base in (stock, model):
        torch.manual_seed(1)
        adapted = peft.get_peft_model(
            base, copy.deepcopy(configs[method])
        ).double()  # PEFT writes what it chose into it
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append([p.grad for p in adapted.parameters() if p.grad is not None])
    torch.testing.assert_close(*losses, **NORMS)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **NORMS)


# ---------------------------------------------------------------------------------------------------------
# Prompts


def prompt_config(method: str) -> Any:
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    return {
        "prompt": lambda: peft.PromptTuningConfig(**options),
        "p-tuning": lambda: peft.PromptEncoderConfig(**options, encoder_hidden_size=8),
        "prefix": lambda: peft.PrefixTuningConfig(**options),
        "prefix projection": lambda: peft.PrefixTuningConfig(**options, prefix_projection=True, encoder_hidden_size=8),
    }[method]()


@pytest.mark.parametrize("method", ["prompt", "p-tuning", "prefix", "prefix projection"])
def test_learned_prompts_equal_those_on_stock_llama(
    stock: Any, model: EaseForCausalLM, ids: torch.Tensor, method: str
) -> None:
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    results = []
    for base in (stock, model):
        torch.manual_seed(1)
        adapted = peft.get_peft_model(base, prompt_config(method)).double()
        with torch.no_grad():
            for parameter in adapted.prompt_encoder.parameters():
                parameter *= 3
        out = adapted.train()(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        out.loss.backward()
        grads = [p.grad for p in adapted.prompt_encoder.parameters()]
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "eos_token_id": None}
        text = adapted.eval().generate(input_ids=ids, do_sample=False, pad_token_id=0, **options)
        results.append((out.loss.detach(), *grads, text))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, **NORMS)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_learned_prompts_keep_early_exits(model: EaseForCausalLM, ids: torch.Tensor, method: str) -> None:
    adapted = peft.get_peft_model(model, prompt_config(method)).double().eval()
    full = adapted(input_ids=ids).logits
    model.set_routing(median_confidence(model, ids), [1])
    out = adapted(input_ids=ids)
    assert out.exits.unique().tolist() == [1, 2]
    for threshold, depth in ((1e-9, 1), (1.0, L)):
        model.set_routing(threshold, [1])
        exits = adapted(input_ids=ids).exits
        assert exits.unique().tolist() == [depth]
    torch.testing.assert_close(adapted(input_ids=ids).logits, full)


def test_a_prefix_that_does_not_fit_is_refused(model: EaseForCausalLM, ids: torch.Tensor) -> None:
    def cache(places: int, heads: int = 2, layers: int = L) -> Any:
        keys = torch.zeros(2, heads, places, 6, dtype=torch.double)
        return transformers.DynamicCache([(keys, keys)] * layers)

    for wrong in (cache(3, heads=4), cache(3, layers=1)):
        with pytest.raises(EaseError, match=r"keys and values \(2, 2, 3, 6\) of 2 layers"):
            model(ids, past_key_values=wrong)
    with pytest.raises(EaseError, match="3 places of the prefix"):
        model(ids, past_key_values=cache(3), attention_mask=torch.zeros(2, 10))
    with pytest.raises(EaseError, match="past_key_values must be an EaseCache"):
        model(ids, past_key_values=transformers.DynamicCache())


# ---------------------------------------------------------------------------------------------------------
# Adapters on disk


def adapter(base: Any, folder: Path, targets: Any = None) -> tuple[Path, Any]:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=targets)
    adapted = peft.get_peft_model(base, config).eval()
    adapted.save_pretrained(folder)
    return folder, adapted


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
def test_an_adapter_names_its_base_and_is_loaded_with_it(
    native_folder: Path, ids: torch.Tensor, tmp_path: Path, targets: Any
) -> None:
    folder, adapted = adapter(EaseForCausalLM.from_pretrained(native_folder), tmp_path, targets)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(native_folder)
    for loaded in (
        peft.AutoPeftModelForCausalLM.from_pretrained(folder),
        peft.PeftModel.from_pretrained(EaseForCausalLM.from_pretrained(native_folder), folder),
    ):
        assert type(loaded.get_base_model()) is EaseForCausalLM
        torch.testing.assert_close(loaded(input_ids=ids).logits, adapted(input_ids=ids).logits)


def test_a_wrapped_model_names_the_checkpoint_that_it_is_given(native_folder: Path, tmp_path: Path) -> None:
    native = ease.from_pretrained(native_folder)
    for name, expected in ((None, None), (native_folder, str(native_folder))):
        options = {} if name is None else {"name_or_path": str(name)}
        folder, _ = adapter(EaseForCausalLM.wrap(native, **options), tmp_path / str(expected is None))
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == expected
        native = ease.from_pretrained(native_folder)


def test_an_adapter_of_a_stock_base_is_for_this_class(stock_folder: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    folder, adapted = adapter(EaseForCausalLM.from_pretrained(stock_folder), tmp_path)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(stock_folder)
    loaded = peft.PeftModel.from_pretrained(EaseForCausalLM.from_pretrained(stock_folder), folder)
    torch.testing.assert_close(loaded(input_ids=ids).logits, adapted(input_ids=ids).logits)
    with pytest.raises(ValueError, match=r"Target modules .* not found in the base model"):
        peft.AutoPeftModelForCausalLM.from_pretrained(folder)  # a stock model, whose modules have other names
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])  # no task: PEFT stores the class
    untyped = peft.get_peft_model(EaseForCausalLM.from_pretrained(stock_folder), config).eval()
    untyped.save_pretrained(tmp_path / "untyped")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "untyped", import_allowlist=["ease"])
    torch.testing.assert_close(loaded(input_ids=ids).logits, untyped(input_ids=ids).logits)


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["embed_tokens", "lm_head", "o_proj"]])
def test_an_adapter_of_a_stock_model_is_loaded(
    stock_folder: Path, ids: torch.Tensor, tmp_path: Path, targets: list[str]
) -> None:
    stock = transformers.LlamaForCausalLM.from_pretrained(stock_folder)
    names = ["embedding" if t == "embed_tokens" else "output_head" if t == "lm_head" else t for t in targets]
    folder, adapted = adapter(stock, tmp_path, targets)
    config = peft.PeftConfig.from_pretrained(folder)
    config.target_modules = set(names)
    loaded = peft.PeftModel.from_pretrained(EaseForCausalLM.from_pretrained(stock_folder), folder, config=config)
    torch.testing.assert_close(loaded(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unmatched", ["embed_tokens", "lm_head", "mlp.up_proj"])
def test_weights_of_a_stock_adapter_that_match_no_module_are_refused(
    stock_folder: Path, native_folder: Path, tmp_path: Path, unmatched: str
) -> None:
    stock = transformers.LlamaForCausalLM.from_pretrained(stock_folder)
    folder, _ = adapter(stock, tmp_path, ["q_proj", unmatched])
    written = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(written | {"base_model_name_or_path": str(native_folder)}))
    with pytest.raises(EaseError, match="has no counterpart in this model: name its target modules"):
        peft.AutoPeftModelForCausalLM.from_pretrained(folder)


def test_a_merged_adapter_can_be_quantized(stock: Any, model: EaseForCausalLM, ids: torch.Tensor) -> None:
    logits = []
    for base in (stock, model):
        torch.manual_seed(1)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=["q_proj"])
        merged = peft.get_peft_model(base.float(), config).merge_and_unload()
        quantized = torch.ao.quantization.quantize_dynamic(merged, {nn.Linear}, dtype=torch.qint8)
        logits.append(quantized.eval()(input_ids=ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_repeated_layers_have_no_exits_and_are_refused(model: EaseForCausalLM, ids: torch.Tensor) -> None:
    """The failure in PEFT's own tests that remains: `layer_replication` adds layers without an exit's norm."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, layer_replication=[[0, 2], [1, 2]], target_modules=["q_proj"])
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(EaseError, match="layer_replication"):
        adapted(input_ids=ids)


@pytest.mark.parametrize("side", [0, -2])
def test_adapters_mixed_within_a_padded_batch_equal_those_alone(
    model: EaseForCausalLM, ids: torch.Tensor, side: int
) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=["q_proj", "up_proj"])
    adapted = peft.get_peft_model(model, config)
    adapted.add_adapter("other", copy.deepcopy(config))
    adapted.double().eval()
    mask = torch.ones_like(ids)
    mask[:, side:][:, :2] = 0
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            mixed = adapted(input_ids=ids, attention_mask=mask, adapter_names=["other", "__base__"]).logits
    adapted.set_adapter("other")
    alone = adapted(input_ids=ids[:1], attention_mask=mask[:1]).logits[0]
    with adapted.disable_adapter():
        base = adapted(input_ids=ids[1:], attention_mask=mask[1:]).logits[0]
    for row, expected in ((0, alone), (1, base)):
        torch.testing.assert_close(mixed[row, mask[row] == 1], expected[mask[row] == 1])


def test_activated_lora_with_gradient_checkpointing_is_refused(model: EaseForCausalLM, ids: torch.Tensor) -> None:
    """Works on Llama, whose checkpointed modules hold the layers: here hooks would be missing in the backward pass."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], alora_invocation_tokens=[int(ids[0, 2])]
    )
    adapted = peft.get_peft_model(model, config).train()
    model.layer_run.gradient_checkpointing = True
    with pytest.raises(EaseError, match="turn gradient checkpointing off"):
        adapted(input_ids=ids)
    model.layer_run.gradient_checkpointing = False
    adapted(input_ids=ids)


def test_what_peft_builds_from_a_stock_structure_fails(model: EaseForCausalLM) -> None:
    """A method that fails here and not on Llama: it changes the configuration of the layers in place."""
    with pytest.raises(Exception, match="cannot assign to field 'num_layers'"):
        peft.get_peft_model(model, peft.ShadowConfig(task_type="CAUSAL_LM"))


def test_the_embedding_has_its_native_name(model: EaseForCausalLM) -> None:
    """Six tests of PEFT fail here and not on Llama, since they adapt `embed_tokens`."""
    with pytest.raises(ValueError, match="not found in the base model"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["embed_tokens"]))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["embedding"]))
    assert [name for name, _ in adapted.named_parameters() if "lora_embedding_A" in name]
