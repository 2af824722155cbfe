"""Layers for decoding: the functional and the packed form compute what the layer does."""

import warnings
from collections.abc import Callable
from typing import Any

import accelerate.hooks
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ease import Policy, StandardTransformer, generate
from ease.model_config import ModelConfig
from ease.modules import Plan, TransformerBlock
from ease.modules.decoding import decoding_layer, functional_layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_functional_layer_equals_the_layer_in_eval_mode(dtype: torch.dtype) -> None:
    layer = TransformerBlock(ModelConfig(9, 32, num_heads=4, num_kv_heads=2, hidden_dim=48, dropout=0.5)).to(dtype)
    for name, weight in layer.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    x = torch.randn(2, 8, 32, dtype=dtype)
    plan = Plan.make(x, 8, None, None)
    with torch.no_grad():
        expected = layer.eval()(x, plan)
        torch.testing.assert_close(functional_layer(layer)(x, plan), expected)
        hooked: list[str] = []
        layer.ffn.down_proj.register_forward_hook(lambda *_: hooked.append("down"))
        torch.testing.assert_close(functional_layer(layer.train())(x, plan), expected)
    assert hooked == ["down"]


@pytest.mark.parametrize(
    ("options", "dtype", "packable"),
    [
        ({}, torch.float64, True),
        ({"num_kv_heads": 2}, torch.float32, True),
        ({"qk_norm": True}, torch.float64, False),
        ({"qkv_bias": True}, torch.float64, False),
        ({"hidden_dim": 30_000}, torch.float32, False),
        ({}, torch.bfloat16, False),
    ],
)
def test_only_small_standard_layers_are_packed(options: dict[str, Any], dtype: torch.dtype, packable: bool) -> None:
    layer = StandardTransformer(11, 16, 1, 4, **options).to(dtype).layers[0]
    assert (getattr(decoding_layer(layer), "__name__", "") == "run") is packable
    layer.ffn.up_proj.register_forward_hook(lambda *_: None)
    assert getattr(decoding_layer(layer), "__name__", "") != "run"


def _replaced_forward(module: nn.Module, called: list[str]) -> None:
    """As accelerate's hooks do: an attribute of the instance replaces the forward of the class."""
    forward = module.forward

    def counted(*args: Any) -> Any:
        called.append("")
        return forward(*args)

    module.forward = counted  # type: ignore[method-assign]


def _compiled(module: nn.Module, called: list[str]) -> None:
    """What `module.compile()` sets, without a compiler."""
    forward = module.forward
    module._compiled_call_impl = lambda *args: called.append("") or forward(*args)  # type: ignore[assignment]


def _hooked_by_accelerate(module: nn.Module, called: list[str]) -> None:
    class Count(accelerate.hooks.ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            called.append("")
            return args, kwargs

    accelerate.hooks.add_hook_to_module(module, Count())


def _parametrized(module: nn.Module, called: list[str]) -> None:
    class Count(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            called.append("")
            return weight

    parametrize.register_parametrization(module, "weight" if hasattr(module, "weight") else "marker", Count())


def _hook(module: nn.Module, called: list[str]) -> None:
    module.register_forward_hook(lambda *_: called.append(""))


PARTS = ("layers.1", "layers.1.attention", "layers.1.attention.q_proj", "layers.1.ffn", "layers.1.ffn.down_proj")
PARTS += ("layers.1.attention.q_norm", "layers.1.attention_norm", "exit_norms.1", "output_head", "embedding")
ALTERATIONS = [_replaced_forward, _compiled, _hooked_by_accelerate, _hook]


@pytest.mark.parametrize("mode", ["full", "routed", "exact"])
@pytest.mark.parametrize("alter", [*ALTERATIONS, _parametrized])
def test_what_replaces_a_forward_is_called_in_decoding(alter: Callable[..., None], mode: Any) -> None:
    policy = Policy((1,), (0.5,))
    for part in PARTS:
        model = StandardTransformer(11, 16, 2, 2, qk_norm=True, num_kv_heads=1).double().eval()
        model.policy = policy
        if alter is _parametrized and not hasattr(model.get_submodule(part), "weight"):
            continue
        options: dict[str, Any] = {"draft_exit": 1} if mode == "exact" else {}
        expected = generate(model, torch.ones(2, 3, dtype=torch.long), 3, mode, **options).tokens
        called: list[str] = []
        alter(model.get_submodule(part), called)
        assert torch.equal(generate(model, torch.ones(2, 3, dtype=torch.long), 3, mode, **options).tokens, expected)
        assert called, part


def test_a_wrapper_around_a_whole_layer_is_in_evaluation_mode() -> None:
    model = StandardTransformer(11, 16, 2, 2, dropout=0.9).train()
    ids = torch.ones(1, 5, dtype=torch.long)
    expected = generate(model, ids, 4).confidences
    for layer in model.layers:
        _hooked_by_accelerate(layer, [])
    torch.testing.assert_close(generate(model, ids, 4).confidences, expected)
    assert all(module.training for module in model.modules())


def test_weights_of_another_kind_are_not_packed() -> None:
    class Quantized(torch.Tensor):
        """A subclass of tensors, as quantizers put into a plain Linear."""

    layer = StandardTransformer(11, 16, 1, 4).layers[0]
    layer.ffn.up_proj.weight = nn.Parameter(layer.ffn.up_proj.weight.detach().as_subclass(Quantized))
    assert getattr(decoding_layer(layer), "__name__", "") != "run"


def test_the_linears_of_lora_and_dynamic_quantization_decode_as_they_run() -> None:
    ids = torch.randint(11, (2, 6))
    for wrap in (_with_lora, _quantized):
        model = wrap(StandardTransformer(11, 16, 2, 2).eval())
        full = model.logits(model.forward_to_layer(ids, 2), 2)
        cache = model.new_cache(2, 6)
        steps = [model.run(model.embed(ids[:, i : i + 1]), 1, 2, cache=cache) for i in range(6)]
        torch.testing.assert_close(model.logits(torch.cat(steps, 1), 2), full, atol=2e-2, rtol=2e-2)


def _with_lora(model: StandardTransformer) -> StandardTransformer:
    for layer in model.layers:
        for name in ("q_proj", "v_proj"):
            linear = Linear(getattr(layer.attention, name), "default", LoraConfig(init_lora_weights=False), r=4)
            setattr(layer.attention, name, linear)
    return model.eval()


def _quantized(model: StandardTransformer) -> StandardTransformer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eager quantization is deprecated, and still in use
        quantized: StandardTransformer = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    return quantized
