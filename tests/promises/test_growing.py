"""Promise 3: adding layers changes no exit that exists, and what a phase freezes stays bit-identical."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ease import (
    ASHEMConfig,
    Data,
    Phase,
    PhaseConfig,
    PhaseOptions,
    StagedConfig,
    StandardTransformer,
    Trainer,
    TrainingConfig,
    train,
)
from ease.errors import EaseError
from ease.interface import train_mode

Make = Callable[..., StandardTransformer]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def exits(model: StandardTransformer, ids: Tensor, count: int) -> list[Tensor]:
    return [model.logits(model.forward_to_layer(ids, k), k) for k in range(model.first_exit, count + 1)]


MEMORY = {"memory_orders": (1, 3), "memory_rows": 64}


@pytest.mark.parametrize("memory", [{}, MEMORY], ids=["plain", "memory"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("old", "new"), [(1, 2), (1, 4), (2, 4), (3, 4), (2, 7)])
def test_growth_changes_no_exit_and_starts_as_the_identity(
    old: int, new: int, dtype: torch.dtype, tied: bool, memory: dict[str, Any], tiny: Make
) -> None:
    ids = torch.randint(256, (2, 9))
    model = tiny(old, sharp=True, tie_embeddings=tied, **memory).to(dtype)
    if model.memory is not None:
        nn.init.normal_(model.memory.table)
    before, tensors = exits(model, ids, old), snapshot(model)
    assert model.grow(new) is model
    model.eval()
    assert model.num_layers == model.config.num_layers == len(model.exit_norms) == new
    after = exits(model, ids, new)
    for k, logits in enumerate(after):
        assert torch.equal(logits, before[min(k, len(before) - 1)])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in tensors.items())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert (model.output_head.weight is model.embedding.weight) == tied


def test_new_layers_depend_on_the_seed_and_on_no_random_number_drawn_since(tiny: Make) -> None:
    def grown(seed: int, drawn: int, layers: int = 3) -> list[Tensor]:
        model = tiny(1)
        torch.manual_seed(seed)
        torch.rand(drawn)  # as dropout does, of which processes draw for their own rows
        state = torch.get_rng_state()
        torch.set_rng_state(state)  # as a resumed training does
        model.grow(layers)
        assert torch.equal(torch.get_rng_state(), state)
        return [layer.attention.q_proj.weight for layer in model.layers[1:]]

    first, again, other = grown(0, 0), grown(0, 7), grown(1, 0)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert not torch.equal(*first)
    assert torch.equal(grown(0, 0, layers=2)[0], first[0])


@pytest.mark.parametrize(("old", "new"), [(1, 3), (2, 3), (2, 4), (2, 7), (4, 6)])
def test_copied_layers_change_no_exit_either(old: int, new: int, tiny: Make) -> None:
    ids = torch.randint(256, (2, 9))
    model = tiny(old, sharp=True)
    before = exits(model, ids, old)
    model.grow(new, "copy").eval()
    after = exits(model, ids, new)
    assert all(torch.equal(a, b) for a, b in zip(after, before))
    assert not torch.equal(after[-1], before[-1])
    # What is copied are layers from the top, in their order.
    source = [
        next(j for j in range(old) if torch.equal(model.layers[j].ffn.up_proj.weight, layer.ffn.up_proj.weight))
        for layer in model.layers[old:]
    ]
    start = max(0, 2 * old - new)
    assert source == [start + i % old for i in range(new - old)]
    # A copy shares no memory with its source.
    with torch.no_grad():
        model.layers[-1].ffn.up_proj.weight.zero_()
        model.exit_norms[-1].weight.zero_()
    assert all(torch.equal(a, b) for a, b in zip(exits(model, ids, old), before))


@pytest.mark.parametrize("memory", [{}, MEMORY], ids=["plain", "memory"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("grow_init", ["identity", "copy"])
@pytest.mark.parametrize("supervise", ["last", "every"])
def test_a_trained_second_phase_leaves_the_first_bit_identical(
    supervise: str,
    grow_init: str,
    tied: bool,
    memory: dict[str, Any],
    tiny: Make,
    text_data: Callable[..., Data],
) -> None:
    data, model = text_data(4, 1), tiny(1, tie_embeddings=tied, **memory)
    config = ASHEMConfig(
        phase1_layers=1,
        phase2_layers=3,
        phase1_max_epochs=1,
        phase2_max_epochs=2,
        phase2_lr=3e-3,
        phase2_patience=None,
        supervise=supervise,  # type: ignore[arg-type]
        grow_init=grow_init,  # type: ignore[arg-type]
    )
    phases = train(model, config.strategy(), data)
    next(phases)
    ids = data.val[0][0]
    before, first = snapshot(model), exits(model.eval(), ids, 1)
    _, history = next(phases)
    after = model.state_dict()
    assert history.steps == 8
    for name, value in before.items():
        assert torch.equal(after[name], value), f"{name} moved though it was frozen"
    assert all(torch.equal(a, b) for a, b in zip(exits(model.eval(), ids, 1), first, strict=True))
    assert not memory or before["memory.table"].any()
    # And it was real training: what is new has moved away from its start.
    assert after["layers.2.attention.o_proj.weight"].any()
    assert not torch.equal(after["exit_norms.2.weight"], after["exit_norms.0.weight"])
    assert all(p.requires_grad for p in model.parameters())


def test_every_phase_leaves_all_before_it_bit_identical(tiny: Make, text_data: Callable[..., Data]) -> None:
    data, model = text_data(3, 1), tiny(1)
    plans = [PhaseConfig(layers=n, ratio=r, lr=3e-3, max_epochs=1) for n, r in ((1, 1.0), (2, 0.6), (4, 0.3))]
    ids, seen = data.val[0][0], []
    for _ in train(model, StagedConfig(tuple(plans)).strategy(), data):
        model.eval()
        now = exits(model, ids, model.num_layers)
        for logits in seen:
            assert all(torch.equal(a, b) for a, b in zip(now, logits))
        seen.append(now)
    assert [len(logits) for logits in seen] == [1, 2, 4]


def test_the_trunk_runs_in_eval_mode_while_new_layers_drop_out(tiny: Make, text_data: Callable[..., Data]) -> None:
    """Seen from inside a real training step: the trunk's state is the same every time, the new layers' is not."""
    (x, y), *_ = text_data(1, 1).train
    model = tiny(2, dropout=0.5).grow(4, "copy")
    model.train()
    states: dict[int, list[Tensor]] = {2: [], 4: []}
    for layer, seen in states.items():
        model.layers[layer - 1].register_forward_hook(lambda _, __, out, seen=seen: seen.append(out.detach().clone()))
    model.eval()
    trunk = model.forward_to_layer(x, 2)
    states[2].clear()

    config = TrainingConfig(layer_weights={4: 1.0})
    phase = Phase("two", config, [(x, y)] * 3, [(x, y)], PhaseOptions(lr=1e-12, max_epochs=1), first=3)
    modes = []
    model.layers[2].register_forward_pre_hook(lambda *_: modes.append([m.training for m in model.modules()]))
    Trainer(config, 256).run(model, phase)

    assert len(states[2]) == 4  # three steps and a validation pass
    assert all(torch.equal(state, trunk) for state in states[2])
    assert not torch.allclose(states[4][0], states[4][1])
    frozen = {model.embedding, *model.layers[:2].modules(), *model.exit_norms[:2], model.output_head}
    for module, training in zip(model.modules(), modes[0]):
        if module in frozen:
            assert not training
    assert all(training for module, training in zip(model.modules(), modes[0]) if module in set(model.layers[2:]))


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_freeze_below_names_exactly_what_learns(tied: bool, head: bool, tiny: Make) -> None:
    model = tiny(3, tie_embeddings=tied)
    if tied and not head:
        with pytest.raises(EaseError, match="tie_embeddings=False"):
            model.freeze_below(3, head=head)
        return
    model.freeze_below(3, head=head)
    learning = {
        name.split(".")[0] + "." + name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad
    }
    shared = set() if head else {"output_head.weight"}
    assert learning == {"layers.2", "exit_norms.2"} | shared
    train_mode(model)
    assert [layer.training for layer in model.layers] == [False, False, True]
    model.freeze_below(1)
    assert all(p.requires_grad for p in model.parameters())
