"""Layouts, and what every model that implements the interface supports."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ease import EaseError, ExitModel, Layout, ModelConfig, Policy, StandardTransformer, route, score
from ease.interface import learnable, train_mode


@pytest.mark.parametrize(
    ("mask", "positions", "segments"),
    [
        ([1, 1, 1], [0, 1, 2], [0, 0, 0]),
        ([0, 1, 1], [0, 0, 1], [-1, 0, 0]),
        ([1, 1, 0], [0, 1, 1], [0, 0, -1]),
        ([0, 1, 0], [0, 0, 0], [-1, 0, -1]),
        ([0, 0, 0], [0, 0, 0], [-1, -1, -1]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_a_mask_becomes_positions_and_segments(
    mask: list[int], positions: list[int], segments: list[int], dtype: torch.dtype
) -> None:
    layout = Layout.from_attention_mask(torch.tensor([mask]).to(dtype))
    real = torch.tensor([mask]).bool()
    assert torch.equal(layout.real, real)
    assert torch.equal(layout.positions[real], torch.tensor([positions])[real])
    assert layout.positions.min() >= 0
    assert layout.segments.tolist() == [segments]


@given(st.lists(st.lists(st.integers(-1, 2), min_size=5, max_size=5), min_size=1, max_size=3))
def test_a_token_sees_its_own_segment_up_to_itself(rows: list[list[int]]) -> None:
    segments = torch.tensor([sorted(row) for row in rows])
    positions = torch.tensor([[sorted(row)[:t].count(sorted(row)[t]) for t in range(5)] for row in rows])
    layout = Layout(positions, segments)
    b, t = layout.real.nonzero(as_tuple=True)
    visible = layout.visible(b, t)
    assert visible.shape == (len(b), 5)
    for row, col, seen in zip(b.tolist(), t.tolist(), visible.tolist()):
        expected = [segments[row, u] == segments[row, col] and u <= col for u in range(5)]
        assert seen == [bool(value) for value in expected]


def test_conveniences_are_compositions_of_the_seam(tiny: Callable[..., StandardTransformer]) -> None:
    model, ids = tiny(3, sharp=True), torch.randint(256, (2, 7))
    with torch.no_grad():
        states = [model.forward_to_layer(ids, k) for k in (1, 2, 3)]
        everything = model.forward_all_layers(ids)
        assert torch.equal(model.run(model.embed(ids), 1, 2), states[1])
        assert torch.equal(model.run(states[0], 2, 3), states[2])
        assert len(everything) == 3
        for k in (1, 2, 3):
            assert torch.equal(everything[k - 1], model.logits(states[k - 1], k))
        assert torch.equal(model(ids), everything[-1])
        torch.testing.assert_close(model.logits(states[0][:, 2], 1), everything[0][:, 2])


@pytest.mark.parametrize("bad", [-1, 256, 10_000])
def test_ids_outside_the_vocabulary_are_refused(bad: int, tiny: Callable[..., StandardTransformer]) -> None:
    model, ids = tiny(1), torch.tensor([[3, bad]])
    for use in (model, model.embed, lambda ids: route(model, ids), lambda ids: score(model, [(ids, ids)])):
        with pytest.raises(EaseError, match=r"token ids must lie in 0\.\.255, .*: use the tokenizer") as error:
            use(ids)
        assert "\n" not in str(error.value)


def test_training_mode_only_where_something_learns(tiny: Callable[..., StandardTransformer]) -> None:
    model = tiny(2)
    model.layers[0].requires_grad_(False)
    train_mode(model)
    assert model.training
    assert model.layers[1].training
    assert not any(module.training for module in model.layers[0].modules())
    assert learnable(model)
    assert not learnable(model.layers[0])
    assert not learnable(nn.Identity())


class Cumulative(ExitModel):
    """A model of another make that keeps the seam: layer k adds the mean of the states before."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.num_layers = ModelConfig(8, 4, 3, 2), 3
        self.table, self.output_head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)

    def embed(self, ids: Tensor, *, layout: Layout | None = None, cache: None = None) -> Tensor:
        self.check_ids(ids, 8)
        return self.table(ids)

    def run(
        self,
        state: Tensor,
        first: int,
        last: int,
        *,
        layout: Layout | None = None,
        active: Tensor | None = None,
        cache: None = None,
    ) -> Tensor:
        for _ in range(first, last + 1):
            new = state + state.cumsum(1) / torch.arange(1, state.shape[1] + 1)[:, None]
            state = new if active is None else torch.where(active[..., None], new, state)
        return state

    def exit_norm(self, state: Tensor, exit: int) -> Tensor:
        return state / exit

    def freeze_below(self, first: int, *, head: bool = True, exits: Sequence[int] = ()) -> None:
        self.table.requires_grad_(first <= 1)
        self.output_head.requires_grad_(first <= 1 or not head)


def test_whoever_keeps_the_seam_is_routed_scored_and_trained() -> None:
    from ease import Trainer, create_deep_supervision_config

    model, ids = Cumulative(), torch.randint(8, (4, 6))
    result = route(model, ids, 1, float(route(model, ids).confidences.median()) / 2)
    assert set(result.exits.unique().tolist()) <= {1, 3}
    trainer = Trainer(create_deep_supervision_config(3), 8)
    before = trainer.evaluate(model, [(ids, ids)])["loss"]
    optimizer = trainer.create_optimizer(model, 0.05)
    for _ in range(20):
        trainer.train_epoch(model, [(ids, ids)], optimizer)
    assert trainer.evaluate(model, [(ids, ids)])["loss"] < before / 2
    assert not isinstance(model, StandardTransformer)


@pytest.mark.parametrize("name", ["exit_layer", "routing_threshold", "policy_options"])
def test_a_model_has_one_policy(name: str, tiny: Callable[..., StandardTransformer]) -> None:
    model = tiny(2)
    with pytest.raises(EaseError, match=r"set model\.policy = ease\.Policy"):
        setattr(model, name, 1)
    assert model.policy == Policy()


def test_modules_without_parameters_follow_the_module_that_they_are_in() -> None:
    frozen, learning = nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    frozen.requires_grad_(False)
    train_mode(nn.ModuleList([frozen, learning]))
    assert [part.training for part in (*frozen, *learning)] == [False, False, True, True]
