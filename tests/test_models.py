"""The model: its shape, its two faces, bad input. How it grows is in promises/test_growing.py."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ease import DeepSupervisionTransformer, EaseError, ModelConfig, Policy, StandardTransformer, route

Make = Callable[..., StandardTransformer]


def test_shapes_and_names() -> None:
    model = StandardTransformer(50, 24, 3, 4, num_kv_heads=2, tie_embeddings=True)
    ids = torch.randint(50, (2, 5))
    assert model(ids).shape == (2, 5, 50)
    assert model.embed(ids).shape == model.forward_to_layer(ids, 2).shape == (2, 5, 24)
    assert [logits.shape for logits in model.forward_all_layers(ids)] == [(2, 5, 50)] * 3
    assert model.num_layers == model.config.num_layers == 3
    top = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert top == {"embedding", "layers", "exit_norms"}
    assert len(model.exit_norms) == 3


def test_what_is_left_out_follows_from_the_rest() -> None:
    config = ModelConfig(100, 64, 3, 4)
    assert (config.head_size, config.kv_heads, config.ffn_size) == (16, 4, 176)
    config = ModelConfig(100, 64, 3, 4, num_kv_heads=2, head_dim=6, hidden_dim=50)
    assert (config.head_size, config.kv_heads, config.ffn_size) == (6, 2, 50)
    assert all(ModelConfig(9, dim, 1, 1).ffn_size % 8 == 0 for dim in (2, 10, 62, 64))
    assert ModelConfig(100, 64).ffn_size >= 64 * 8 / 3


@pytest.mark.parametrize("name", ["adapter_exits", "classifier_exits", "unrotated_layers", "windowed_layers"])
def test_lists_of_layers_are_sorted_and_name_a_layer_once(name: str) -> None:
    options = {"num_layers": 4, "adapter_dim": 8 * (name == "adapter_exits"), "window": 4}
    config = ModelConfig(9, 8, **options, **{name: [3, 1, 3]})  # type: ignore[arg-type]
    assert getattr(config, name) == (1, 3)
    assert config == ModelConfig(9, 8, **options, **{name: (1, 3)})  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tied: bool) -> None:
    model = StandardTransformer(50, 24, 1, 4, tie_embeddings=tied)
    assert (model.output_head.weight is model.embedding.weight) == tied
    assert model.config.tie_embeddings == tied
    assert 0.015 < model.output_head.weight.std() < 0.025


def test_an_untrained_model_guesses_evenly() -> None:
    """Its loss starts near log V at every exit, whatever the depth."""
    model, ids = StandardTransformer(512, 32, 12, 4), torch.randint(512, (4, 16))
    for logits in model.forward_all_layers(ids):
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())
        assert loss.item() == pytest.approx(torch.tensor(512.0).log().item(), abs=0.3)
    state = model.forward_to_layer(ids, 12)
    assert 0.1 < state.std() < 3


def test_both_faces_hold_the_same_weights() -> None:
    deep = DeepSupervisionTransformer(50, 24, 3, 4, exit_layer=(1, 2), routing_threshold=(0.5, 0.25))
    plain = StandardTransformer(50, 24, 3, 4)
    plain.load_state_dict(deep.state_dict())
    ids = torch.randint(50, (2, 5))
    assert torch.equal(deep(ids), plain(ids))
    assert deep.policy == Policy((1, 2), (0.5, 0.25))
    assert plain.policy == Policy()


def test_route_follows_the_model_s_own_policy_and_forward_does_not() -> None:
    model = DeepSupervisionTransformer(50, 24, 3, 4, exit_layer=2, routing_threshold=1e-6)
    ids = torch.randint(50, (2, 5))
    assert (route(model, ids).exits == 2).all()
    assert torch.equal(route(model, ids).logits, model.logits(model.forward_to_layer(ids, 2), 2))
    assert torch.equal(model(ids), model.logits(model.forward_to_layer(ids, 3), 3))
    assert (route(model, ids, routing_threshold=0.0).exits == 3).all()
    assert (route(model, ids, 1, 1e-6).exits == 1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_run_routed(dtype: torch.dtype, tiny: Make) -> None:
    model = tiny(2, sharp=True).to(dtype)
    result = route(model, torch.randint(256, (2, 9)), 1, 0.05, torch.ones(2, 9).tril(7))
    assert result.logits.dtype == dtype
    assert result.confidences.dtype == torch.promote_types(dtype, torch.float32)
    assert result.logits.isfinite().all()


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"dim": -4}, "dim must be at least 1"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"num_heads": 0}, "num_heads must be at least 1"),
        ({"num_kv_heads": -1}, "num_kv_heads must be at least 1"),
        ({"head_dim": -2}, "head_dim must be at least 1"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1"),
        ({"norm_eps": math.nan}, "norm_eps must be at least 0"),
        ({"dim": 30}, r"dim \(30\) must be a multiple of num_heads \(4\), or set head_dim"),
        ({"dim": 12}, "must be even for rotary positions, got 3: change dim or num_heads"),
        ({"head_dim": 5}, "must be even"),
        ({"num_kv_heads": 3}, r"num_kv_heads \(3\) must divide num_heads \(4\)"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout must lie in \[0, 1\)"),
    ],
)
def test_bad_shapes_are_refused(change: dict[str, Any], fix: str) -> None:
    for make in (ModelConfig, StandardTransformer, DeepSupervisionTransformer):
        with pytest.raises(EaseError, match=fix) as error:
            make(**{"vocab_size": 10, "dim": 32, "num_layers": 2, "num_heads": 4} | change)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("bad", "fix"),
    [
        ({"exit_layer": 3, "routing_threshold": 0.5}, "exit_layer 3 must lie below the last of the model's 3 layers"),
        ({"exit_layer": (1, 7), "routing_threshold": (0.5, 0.5)}, r"choose a lower exit.* or routing_threshold=0\.0"),
        ({"exit_layer": (1, 2), "routing_threshold": (0.5,)}, "give one threshold per exit"),
        ({"exit_layer": 1, "routing_threshold": 1.5}, r"routing_threshold must lie in \[0, 1\]"),
    ],
)
def test_a_policy_that_the_model_cannot_follow_is_refused(bad: dict[str, Any], fix: str) -> None:
    with pytest.raises(EaseError, match=fix):
        DeepSupervisionTransformer(50, 24, 3, 4, **bad)


def test_without_routing_the_exit_is_ignored() -> None:
    for exit_layer in (1, 3, 99):
        model = DeepSupervisionTransformer(50, 24, 3, 4, exit_layer=exit_layer, routing_threshold=0.0)
        assert (route(model, torch.zeros(1, 2, dtype=torch.long)).exits == 3).all()


def test_layers_and_exits_that_do_not_exist_are_refused(tiny: Make) -> None:
    model = tiny(2)
    state = model.embed(torch.zeros(1, 2, dtype=torch.long))
    for first, last in ((0, 1), (1, 3), (2, 1), (3, 3)):
        with pytest.raises(EaseError, match=r"the model has layers 1\.\.2, got"):
            model.run(state, first, last)
    for k in (0, -1, 3):
        with pytest.raises(EaseError, match=r"the model has exits 1\.\.2, got"):
            model.logits(state, k)


@pytest.mark.parametrize(
    ("layers", "init", "fix"),
    [
        (2, "identity", "the model has 2 layers already: grow to more than that"),
        (1, "copy", "grow to more than that"),
        (4, "random", "init must be identity or copy"),
    ],
)
def test_bad_growth_is_refused_and_changes_nothing(layers: int, init: Any, fix: str, tiny: Make) -> None:
    model = tiny(2)
    with pytest.raises(EaseError, match=fix):
        model.grow(layers, init)
    assert model.num_layers == model.config.num_layers == len(model.exit_norms) == 2


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_but_the_head_belongs_to_one_layer(tied: bool, tiny: Make) -> None:
    model = tiny(3, tie_embeddings=tied, adapter_exits=(1,), adapter_dim=8, classifier_exits=(2,))
    found = [(layer, p) for layer in (1, 2, 3) for p in model.parameters_of(layer)]
    assert len({p for _, p in found}) == len(found), "in two layers"
    names = {p: name for name, p in model.named_parameters()}
    assert set(names) - {p for _, p in found} == {model.output_head.weight}
    layer_of = {names[p]: layer for layer, p in found}
    expected = {
        "layers.1.ffn.up_proj.weight": 2,
        "exit_norms.2.weight": 3,
        "exit_adapters.1.up_proj.weight": 1,
        "exit_classifiers.2.bias": 2,
    } | ({} if tied else {"embedding.weight": 1})
    assert {name: layer_of[name] for name in expected} == expected


@pytest.mark.parametrize("exit", [0, 3, 9])
def test_a_classifier_is_for_an_exit_below_the_last(exit: int, tiny: Callable[..., StandardTransformer]) -> None:
    with pytest.raises(EaseError, match="name exits below layer 3"):
        tiny(3).set_classifiers({exit: torch.zeros(33)})
