"""Exit classifiers: one that was trained before what lies below it is refused when it is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ease
from ease import Data, Policy, StandardTransformer, TuneConfig, train
from ease.errors import EaseError
from ease.runs.store import load_model, save_model
from ease.training.exit_classifiers import lessons, with_classifiers

POLICY = Policy((1, 2), (0.5, 0.5), "classifier")


@pytest.fixture
def model(tiny: Callable[..., StandardTransformer], text_data: Callable[..., Data]) -> StandardTransformer:
    """Three layers with classifiers at the exits 1 and 2."""
    model = tiny(3)
    model.trained_exits = {1, 2, 3}
    ease.learn_agreement(model, text_data().val, (1, 2))
    return model


def refused(model: StandardTransformer, exits: tuple[int, ...]) -> bool:
    """Whether the policy is refused at every one of the exits."""
    ids = torch.arange(8)[None]
    for exit in exits:
        with pytest.raises(EaseError, match=rf"classifier of exit {exit} is stale.*train it again"):
            ease.route(model, ids, policy=Policy((exit,), (0.5,), "classifier"))
    return True


def routes(model: StandardTransformer, exits: tuple[int, ...]) -> bool:
    for exit in exits:
        ease.route(model, torch.arange(8)[None], policy=Policy((exit,), (0.5,), "classifier"))
    return True


def test_gain_is_the_probability_that_depth_does_not_double(
    model: StandardTransformer, text_data: Callable[..., Data]
) -> None:
    (x, y), *_ = held_out = text_data().val
    lesson = lessons(model, held_out[:1], (1,))[1]
    with torch.no_grad():
        p, q = (model.forward_to_layer(x, 1), model.forward_to_layer(x, 3))
        p, q = (model.logits(h, e).softmax(-1).gather(-1, y[..., None]).flatten() for h, e in ((p, 1), (q, 3)))
    torch.testing.assert_close(lesson.targets["gain"], p / (p + q))


def test_classifiers_of_a_view_are_not_in_the_model(model: StandardTransformer) -> None:
    model.stale_classifiers = {1, 2}
    view = with_classifiers(model, {2: torch.ones(model.config.dim + 1)})
    assert routes(view, (2,))
    assert refused(view, (1,))
    assert refused(model, (1, 2))
    assert view.output_head.weight is model.output_head.weight


def test_a_phase_of_layers_makes_the_classifiers_above_stale(
    model: StandardTransformer, text_data: Callable[..., Data]
) -> None:
    assert routes(model, (1, 2))
    data = text_data()
    trainer = ease.Trainer(ease.create_standard_config(3), 256)
    model.freeze_below(2)
    trainer.train_epoch(model, data.train, trainer.create_optimizer(model, 1e-3))
    assert model.stale_classifiers == {2}
    assert routes(model, (1,))
    assert refused(model, (2,))
    model.freeze_below(1)
    trainer.train_epoch(model, data.train, trainer.create_optimizer(model, 1e-3))
    assert refused(model, (1, 2))
    ease.learn_agreement(model, data.val, (1, 2))
    assert routes(model, (1, 2))


def test_a_phase_of_exit_norms_makes_their_classifiers_stale(
    model: StandardTransformer, text_data: Callable[..., Data]
) -> None:
    list(train(model, TuneConfig(exits=(2,), max_epochs=1).strategy(), text_data()))
    assert routes(model, (1,))
    assert refused(model, (2,))


def test_a_classifier_that_learns_along_is_not_stale(text_data: Callable[..., Data]) -> None:
    config = ease.GatedConfig(exit_layer=1, max_epochs=2)
    model = StandardTransformer(256, 32, config.num_layers, 4)
    strategy = config.strategy()
    list(train(model, strategy, text_data()))
    assert not model.stale_classifiers
    ease.route(model, torch.arange(8)[None], policy=strategy.policy())


def test_a_stale_classifier_stays_stale_in_files(
    model: StandardTransformer, text_data: Callable[..., Data], tmp_path: Path
) -> None:
    def phase(model: Any) -> None:
        list(train(model, TuneConfig(exits=(2,), max_epochs=1).strategy(), text_data(), checkpoints=tmp_path / "kept"))

    phase(model)
    save_model(tmp_path, model, POLICY)
    assert refused(load_model(tmp_path)[0], (2,))
    again = StandardTransformer(**vars(model.config))
    again.load_state_dict(model.state_dict())
    phase(again)  # loaded from its checkpoint
    assert refused(again, (2,))
    pytest.importorskip("huggingface_hub")
    ease.save_pretrained(model, tmp_path / "exported")
    loaded = ease.from_pretrained(tmp_path / "exported")
    assert routes(loaded, (1,))
    assert refused(loaded, (2,))
