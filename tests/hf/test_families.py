"""Families: tiny random checkpoints of each compute in ease what they compute in stock transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import ease
from ease import EaseError
from ease.hf.config import read_config
from ease.hf.families import FAMILIES
from ease.hf.model import EaseForCausalLM
from ease.training.step import step_loss

T = 24

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0} | options}


LONGROPE = {
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [2.0] * 6,
    },
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama with GELU": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "linear": ("llama", rope("linear")),
    "dynamic": ("llama", rope("dynamic")),
    "llama3": (
        "llama",
        rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "yarn": ("qwen2", rope("yarn", original_max_position_embeddings=16)),
    "Mistral with a window": ("mistral", {"sliding_window": 5}),
    "Qwen2 with upper windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "Qwen3": ("qwen3", {"head_dim": 16}),
    "SmolLM3": ("smollm3", {}),
    "Phi-3": ("phi3", {"sliding_window": 7}),
    "Phi-4-mini": (
        "phi3",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True, **LONGROPE},
    ),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": (
        "olmo3",
        {
            "sliding_window": 5,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 500_000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                    "attention_factor": 1.2,
                },
            },
        },
    ),
    "EXAONE 4": ("exaone4", {"sliding_window": 5}),
    "EXAONE 4 without a window": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 6}),
    "Granite 3": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.05,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
    ),
    "Gemma": ("gemma", {"head_dim": 16}),
    "Gemma 2": (
        "gemma2",
        {
            "head_dim": 12,
            "sliding_window": 5,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "Gemma 3": ("gemma3_text", {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 20}),
}


def stock_model(case: str) -> Any:
    family, options = CASES[case]
    torch.manual_seed(0)
    # Sdpa kernels differ from eager attention by rounding, and have no soft caps.
    config = AutoConfig.for_model(family, **SHAPE | options, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # far from the initial values, so that every norm and bias counts
        for name, parameter in model.named_parameters():
            if "norm" in name or parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
    return model


@pytest.fixture(params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    model = stock_model(request.param)
    model.save_pretrained(tmp_path / "stock")
    return model, tmp_path / "stock"


def greedy(model: Any, ids: Tensor, count: int) -> Tensor:
    """Without a cache: in stock transformers a windowed cache may give other tokens than the whole text."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[:, -count:]


@torch.no_grad()
def test_a_family_computes_what_stock_transformers_computes(checkpoint: tuple[Any, Path], tmp_path: Path) -> None:
    stock, folder = checkpoint
    model = ease.from_pretrained(folder)
    ids = torch.randint(0, SHAPE["vocab_size"], (3, T))
    expected = stock(ids).logits
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=2e-5)

    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = stock(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    found = EaseForCausalLM.wrap(model)(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(found, padded, rtol=1e-4, atol=2e-5)

    wrapped = EaseForCausalLM.wrap(model)
    torch.testing.assert_close(wrapped(inputs_embeds=wrapped.get_input_embeddings()(ids)).logits, model(ids))

    tokens = ease.generate(model, ids[:, :10], 12).tokens
    assert torch.equal(tokens, greedy(stock, ids[:, :10], 12))

    ease.save_pretrained(model, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    torch.testing.assert_close(exported(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert ease.from_pretrained(tmp_path / "out").config == model.config


@torch.no_grad()
def test_in_bfloat16_a_family_is_about_as_far_from_float32_as_stock_is(checkpoint: tuple[Any, Path]) -> None:
    stock, folder = checkpoint
    ids = torch.randint(0, SHAPE["vocab_size"], (8, T))
    exact = stock(ids).logits
    own = ease.from_pretrained(folder, dtype="bfloat16")(ids).float() - exact
    theirs = stock.to(torch.bfloat16)(ids).logits.float() - exact
    assert own.norm() < 1.2 * theirs.norm()


@pytest.mark.parametrize("case", ["Gemma 3", "Gemma 2", "Mistral with a window", "SmolLM3", "OLMo 2", "EXAONE 4"])
def test_all_modes_agree_in_float64(case: str, tmp_path: Path) -> None:
    """Windows, local angles, soft caps and norms in a padded, a packed, a routed, a cached and an exact run."""
    stock_model(case).save_pretrained(tmp_path)
    model = ease.from_pretrained(tmp_path, dtype="float64")
    ids = torch.randint(0, SHAPE["vocab_size"], (3, T))
    with torch.no_grad():
        plain = model(ids)
        states = {exit: model.run(model.embed(ids), 1, exit) for exit in (2, 4)}
        packed = torch.cat([ids[:1], ids[1:2]], 1)
        places = torch.arange(T).repeat(2)[None]
        layout = ease.Layout(places, torch.arange(2).repeat_interleave(T)[None])
        state = model.run(model.embed(packed), 1, model.num_layers, layout=layout)
        torch.testing.assert_close(model.logits(state, model.num_layers)[0].view(2, T, -1), plain[:2])

    medians = [float(ease.compute_confidence(model, state, exit).quantile(0.5)) for exit, state in states.items()]
    model.policy = ease.Policy(exits=(2, 4), thresholds=tuple(medians))
    routed = ease.route(model, ids)
    assert set(routed.exits.unique().tolist()) == {2, 4, 6}
    wrapped = EaseForCausalLM.wrap(model).eval()
    cached, cache = [], None
    for start, end in ((0, 9), (9, 10), (10, 15), *((at, at + 1) for at in range(15, T))):
        output = wrapped(ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        cached.append(output.logits)
    torch.testing.assert_close(torch.cat(cached, 1), routed.logits)

    full = ease.generate(model, ids[:, :10], 12).tokens
    assert torch.equal(ease.generate(model, ids[:, :10], 12, "exact", draft_exit=4).tokens, full)


@pytest.mark.parametrize("case", ["Gemma 2", "Phi-3", "OLMo 2"])
def test_a_family_trains(case: str, tmp_path: Path) -> None:
    """Gradients of every parameter equal stock's, soft caps and fused tensors included."""
    stock = stock_model(case)
    stock.save_pretrained(tmp_path)
    model = ease.from_pretrained(tmp_path)
    ids = torch.randint(0, SHAPE["vocab_size"], (2, T))
    expected = stock(ids, labels=ids).loss
    torch.testing.assert_close(EaseForCausalLM.wrap(model)(ids, labels=ids).loss, expected)
    expected.backward()
    batch = ease.Batch(ids[:, :-1], ids[:, 1:])
    config = ease.TrainingConfig(layer_weights={model.num_layers: 1.0})
    step_loss(model, config, batch).backward()
    theirs = sum(float(p.grad.square().sum()) for p in stock.parameters())
    own = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert own == pytest.approx(theirs, rel=1e-4)


def test_a_checkpoint_saved_without_its_head_loads_if_the_head_is_tied(tmp_path: Path) -> None:
    stock = stock_model("Gemma 3")
    stock.model.save_pretrained(tmp_path)
    ids = torch.randint(0, SHAPE["vocab_size"], (2, T))
    with torch.no_grad():
        torch.testing.assert_close(ease.from_pretrained(tmp_path)(ids), stock(ids).logits, rtol=1e-4, atol=2e-5)


def test_beyond_the_original_context_stretched_positions_are_refused(tmp_path: Path) -> None:
    stock_model("Phi-4-mini").save_pretrained(tmp_path)
    model = ease.from_pretrained(tmp_path)
    assert model.config.max_positions == 64
    with pytest.raises(EaseError, match="beyond 64 tokens"):
        model(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("olmo3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "for each type of layers"),
        ("llama", {"no_rope_layers": [1, 0, 1, 1, 1, 1]}, "no_rope_layers"),
        ("llama", {"layer_types": ["sliding_attention"] * 6, "sliding_window": 3}, "layer_types"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"hidden_activation": "relu"}, "hidden_activation 'relu'"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias"),
        ("exaone4", {"sliding_window": 3, "layer_types": ["full_attention"] * 6}, "sliding_window that no layer uses"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"embedding_multiplier": 2.0}, "embedding_multiplier"),
    ],
)
def test_a_configuration_that_the_family_does_not_compute_is_refused_by_name(
    family: str, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(EaseError, match=named):
        read_config({"model_type": family, **SHAPE, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_harmless_keys_of_published_configurations_are_known(family: str) -> None:
    harmless = json.loads(
        '{"max_sequence_length": 64, "activation": "swiglu", "auto_map": {}, "tokenizer_class": "X", "max_length": 20,'
        ' "is_decoder": false, "quantization_config": null, "_commit_hash": null, "torch_dtype": "bfloat16"}'
    )
    assert read_config({"model_type": family, **SHAPE, **harmless}) == read_config({"model_type": family, **SHAPE})
