"""ASHEM: two phases of the staged strategy, and the original recipe beside them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ease import (
    ASHEMConfig,
    Batch,
    Data,
    EaseError,
    History,
    MinedBatches,
    PhaseConfig,
    StagedConfig,
    StandardTransformer,
    compute_confidence_threshold,
    score,
    train,
)

Make = Callable[..., StandardTransformer]
SMALL: dict[str, Any] = {
    "phase1_layers": 1,
    "phase2_layers": 3,
    "phase1_max_epochs": 2,
    "phase2_max_epochs": 2,
    "phase1_lr": 3e-3,
    "phase2_lr": 1e-3,
}


def test_ashem_is_the_two_phase_case_of_staged(tiny: Make, text_data: Callable[..., Data]) -> None:
    """The same plan in either's words gives the same weights, thresholds and figures, bit for bit."""
    plan = StagedConfig(
        (
            PhaseConfig(layers=1, lr=3e-3, patience=1, max_epochs=2),
            PhaseConfig(layers=3, lr=1e-3, patience=3, max_epochs=2, ratio=0.4),
        )
    )
    assert ASHEMConfig(**SMALL, hard_example_ratio=0.4).staged() == plan
    ends = []
    for config in (ASHEMConfig(**SMALL, hard_example_ratio=0.4), plan):
        data, model, strategy = text_data(4, 1), tiny(1), config.strategy()
        torch.manual_seed(3)
        histories = [history for _, history in train(model, strategy, data)]
        ends.append((strategy.policy(), [h.column("val_loss") for h in histories], histories[1].flops, model))
    assert ends[0][:3] == ends[1][:3]
    other = ends[1][3].state_dict()
    assert all(torch.equal(value, other[name]) for name, value in ends[0][3].state_dict().items())


def test_every_setting_reaches_its_phase() -> None:
    config = ASHEMConfig(
        phase1_layers=3,
        phase1_lr=1e-2,
        phase1_patience=7,
        hard_example_ratio=0.3,
        phase2_layers=9,
        phase2_lr=1e-5,
        phase2_patience=None,
        phase1_max_epochs=11,
        phase2_max_epochs=12,
        phase1_max_flops=1e9,
        phase2_max_flops=2e9,
        schedule="cosine",
        warmup=0.1,
        weight_decay=0.01,
        grow_init="copy",
        supervise="every",
        trunk_budget=5.0,
        seed=9,
    )
    common: dict[str, Any] = {"schedule": "cosine", "warmup": 0.1, "weight_decay": 0.01, "supervise": "every"}
    first = PhaseConfig(layers=3, lr=1e-2, patience=7, max_epochs=11, max_flops=1e9, **common)
    second = PhaseConfig(
        layers=9, lr=1e-5, patience=None, max_epochs=12, max_flops=2e9, ratio=0.3, grow_init="copy", **common
    )
    assert config.staged() == StagedConfig((first, second), 5.0, 9)
    assert config.num_layers == 3


def test_the_defaults_are_those_of_the_original() -> None:
    config = ASHEMConfig()
    assert (config.phase1_layers, config.phase2_layers, config.hard_example_ratio) == (2, 4, 0.5)
    assert (config.phase1_lr, config.phase2_lr, config.phase1_patience, config.phase2_patience) == (1e-3, 1e-4, 1, 3)
    assert config.protocol == "held-out"


@pytest.mark.parametrize(
    ("bad", "fix"),
    [
        ({"phase1_layers": 2, "phase2_layers": 2}, r"phase2_layers \(2\) must be more than phase1_layers \(2\)"),
        ({"phase1_layers": 4, "phase2_layers": 3}, r"phase2_layers \(3\) must be more than phase1_layers \(4\)"),
        ({"hard_example_ratio": 0.0}, r"must lie in \(0, 1\]"),
        ({"hard_example_ratio": 1.2}, r"must lie in \(0, 1\]"),
        ({"hard_example_ratio": -0.5}, r"must lie in \(0, 1\]"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(bad: dict[str, Any], fix: str) -> None:
    with pytest.raises(EaseError, match=fix) as error:
        ASHEMConfig(**bad)
    assert "\n" not in str(error.value)


# The original recipe


def run_seed(model: StandardTransformer, data: Data) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """The strategy, its second phase and history, and the weights between the phases."""
    strategy = ASHEMConfig(**SMALL, protocol="original").strategy()
    phases = train(model, strategy, data)
    next(phases)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (second,) = phases
    return strategy, second, before


def test_the_original_recipe_trains_sequences_of_length_one_on_half_the_tokens(
    tiny: Make, text_data: Callable[..., Data]
) -> None:
    data, model = text_data(4, 2), tiny(1, tie_embeddings=False)
    strategy, (phase, history), before = run_seed(model, data)
    batches = [Batch(*item) for item in phase.train]
    assert all(batch.x.shape == batch.y.shape == (len(batch.x), 1) for batch in batches)
    assert all(batch.state.shape == (len(batch.x), 1, 32) for batch in batches if batch.state is not None)
    assert {len(batch.x) for batch in batches[:-1]} == {64}
    total = sum(y.numel() for _, y in data.val)
    hard = sum(len(batch.x) for batch in batches)
    assert hard == total // 2
    assert strategy.mined == [{"threshold": strategy.policy().thresholds[0], "count": hard, "of": total}]
    # The states are those of the trunk, and the threshold that of phase 1 on the validation tokens.
    shallow = tiny(1, tie_embeddings=False)
    shallow.load_state_dict(before)
    assert strategy.policy().exits == (1,)
    assert strategy.policy().thresholds == (compute_confidence_threshold(shallow, data.val, 0.5),)
    assert history.flops["trunk"] == 0
    assert history.flops["mining"] == 2 * score(shallow, data.val).flops
    assert phase.restore_best is False


def test_the_original_recipe_trains_the_head_and_no_lower_layer(tiny: Make, text_data: Callable[..., Data]) -> None:
    model = tiny(1, tie_embeddings=False)
    _, _, before = run_seed(model, text_data(2, 1))
    moved = {name for name, value in before.items() if not torch.equal(model.state_dict()[name], value)}
    assert moved == {"output_head.weight"}
    assert model.layers[2].attention.o_proj.weight.any()


def test_both_protocols_share_phase_one(tiny: Make, text_data: Callable[..., Data]) -> None:
    data = text_data(2, 1)
    ends = []
    for protocol in ("held-out", "original"):
        model = tiny(1)
        torch.manual_seed(5)
        phase, history = next(train(model, ASHEMConfig(**SMALL, protocol=protocol).strategy(), data))  # type: ignore[arg-type]
        assert phase.train is data.train
        ends.append((history.column("val_loss"), model.state_dict()))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(value, ends[1][1][name]) for name, value in ends[0][1].items())


def test_the_old_name_of_the_original_recipe_works_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match='now called "original"'):
        config = ASHEMConfig(protocol="seed")
    assert config == ASHEMConfig(protocol="original")


def test_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(EaseError, match="protocol must be held-out or original"):
        ASHEMConfig(protocol="held_out")  # type: ignore[arg-type]
    with pytest.raises(EaseError, match="schedule must be constant or cosine"):
        ASHEMConfig(schedule="linear")  # type: ignore[arg-type]
    with pytest.raises(EaseError, match="lr must be above 0"):
        ASHEMConfig(phase2_lr=0)
    with pytest.raises(EaseError, match="first phase is trained on all tokens"):
        StagedConfig((PhaseConfig(layers=1, ratio=0.5), PhaseConfig(layers=2)))


def test_a_budget_that_mining_exceeds_is_refused(
    tiny: Make, text_data: Callable[..., Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before mining if mining alone exceeds it, and before training if the validation at the end of an epoch does."""

    def phase_two(limit: float | None) -> History:
        config = ASHEMConfig(1, phase2_layers=2, phase1_max_epochs=1, phase2_max_epochs=1, phase2_max_flops=limit)
        *_, (_, history) = train(tiny(1), config.strategy(), text_data(8, 2))
        return history

    free = phase_two(None).flops
    mining, validation = free["mining"], free["validation"]
    assert phase_two(mining + 2 * validation).steps > 1
    with pytest.raises(EaseError, match=r"^mining and one validation of phase 2 takes .*: raise max_flops") as error:
        phase_two(mining + validation / 2)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(MinedBatches, "_mine", None)
    with pytest.raises(
        EaseError, match=rf"^mining takes {mining:.3g} FLOPs and .*may take {mining:.3g} in all".replace("+", r"\+")
    ):
        phase_two(mining)
