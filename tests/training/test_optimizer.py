"""What learns is float32, also in a model in half precision."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ease import (
    ASHEMConfig,
    Data,
    Execution,
    GrowthConfig,
    StandardConfig,
    StandardTransformer,
    Trainer,
    TuneConfig,
    create_standard_config,
    score,
    train,
)
from ease.training.optimizer import MASTER, MasterAdamW

Make = Callable[..., StandardTransformer]
SMALL = {"max_epochs": 2, "lr": 1e-3, "patience": None}


@pytest.mark.parametrize("adapter", ["none", "mlp"])
def test_exits_of_a_bfloat16_model_are_tuned(adapter: str, tiny: Make, text_data: Callable[..., Data]) -> None:
    model, data = tiny(3), text_data(4, 1)
    list(train(model, StandardConfig(num_layers=3, **SMALL | {"max_epochs": 6, "lr": 1e-2}).strategy(), data))
    model.bfloat16()
    frozen = {name: value.clone() for name, value in model.state_dict().items() if "exit" not in name}
    before = score(model, data.val, last=1).metrics()["loss"]
    norms = model.exit_norms[0].weight.clone()
    config = TuneConfig(exits=(1,), adapter=adapter, **SMALL | {"max_epochs": 6})  # type: ignore[arg-type]
    ((_, history),) = train(model, config.strategy(), data)
    losses = history.column("val_loss")
    assert losses[-1] < losses[0] < before
    assert (model.exit_norms[0].weight != norms).float().mean() > 0.5
    assert model.exit_norms[0].weight.dtype == torch.bfloat16
    assert all(torch.equal(value, frozen[name]) for name, value in model.state_dict().items() if name in frozen)


@pytest.mark.parametrize(
    "config",
    [
        StandardConfig(num_layers=2, **SMALL),
        GrowthConfig(layers=(1, 2), **SMALL),
        ASHEMConfig(phase1_layers=1, phase2_layers=2, phase1_max_epochs=2, phase2_max_epochs=2, phase2_lr=1e-3),
    ],
    ids=["standard", "growth", "ashem"],
)
def test_every_strategy_trains_in_bfloat16(config: object, tiny: Make, text_data: Callable[..., Data]) -> None:
    model, data = tiny(config.num_layers).bfloat16(), text_data(6, 1)  # type: ignore[attr-defined]
    before = score(model, data.val).metrics()["loss"]
    for phase, history in train(model, config.strategy(), data):  # type: ignore[attr-defined]
        assert history.column("val_loss")[-1] < before, phase.name
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_small_updates_add_up_and_survive_a_checkpoint() -> None:
    """At 1 bfloat16 has a spacing of 2^-8 below, so that a single update of 1e-3 is rounded away."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))

    def steps(optimizer: torch.optim.Optimizer, n: int) -> None:
        for _ in range(n):
            weight.sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    optimizer = MasterAdamW([{"params": [weight], "weight_decay": 0.0}], 1e-3)
    steps(optimizer, 1)
    assert (weight == 1).all()
    saved = copy.deepcopy(optimizer.state_dict())
    steps(optimizer, 9)
    assert torch.allclose(weight.float(), torch.full((4,), 0.99), atol=2**-8)
    whole = weight.detach().clone()

    weight.data.fill_(1)
    resumed = MasterAdamW([{"params": [weight], "weight_decay": 0.0}], 1e-3)
    resumed.load_state_dict(saved)
    steps(resumed, 9)
    assert torch.equal(weight, whole)
    (master,) = resumed.param_groups[0]["params"]
    assert master.dtype == torch.float32
    assert resumed.state[master][MASTER] is master


def test_a_bfloat16_phase_resumes_with_the_same_bits(
    tiny: Make, text_data: Callable[..., Data], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: Path | None, stop: int | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = tiny(2).bfloat16()
        phases = train(model, StandardConfig(num_layers=2, **SMALL).strategy(), text_data(4, 1), checkpoints=folder)
        if stop is not None:
            monkeypatch.setattr("ease.training.checkpoint.EVERY", 0.0)
            calls = iter(range(stop))
            monkeypatch.setattr("ease.trainer.step_loss", lambda *a, f=step_loss: (next(calls), f(*a))[1])
        list(phases)
        return model.state_dict()

    from ease.training.step import step_loss

    whole = run(None)
    with pytest.raises(RuntimeError):  # `next` ran out inside the generator
        run(tmp_path, stop=5)
    monkeypatch.undo()
    assert all(torch.equal(whole[name], value) for name, value in run(tmp_path).items())


def test_float32_parameters_are_updated_in_place() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = MasterAdamW([{"params": [weight]}], 1e-3)
    assert optimizer.param_groups[0]["params"][0] is weight


def test_other_optimizers_train_the_model_afterwards(tiny: Make, text_data: Callable[..., Data]) -> None:
    model, data = tiny(2).bfloat16(), text_data(4, 1)
    list(train(model, StandardConfig(num_layers=2, **SMALL).strategy(), data))
    x, _ = next(iter(data.train))
    model(x).float().sum().backward()
    assert all(p.grad is not None for p in model.layers.parameters())
    before = model.output_head.weight.detach().clone()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert not torch.equal(model.output_head.weight, before)


def test_weights_that_were_changed_between_steps_count() -> None:
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    first, second = (MasterAdamW([{"params": [weight], "weight_decay": 0.0}], 0.0) for _ in range(2))
    for optimizer, value in ((first, 2.0), (second, 3.0), (first, 4.0)):
        with torch.no_grad():
            weight.fill_(value)
        weight.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (weight == value).all()


def test_gradients_do_not_add_up_after_the_models_own_zero_grad() -> None:
    model = torch.nn.Linear(2, 2, bias=False).bfloat16()
    optimizer = MasterAdamW([{"params": list(model.parameters())}], 1e-3)
    for _ in range(3):
        model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
        assert model.weight.grad is not None
        assert (model.weight.grad == 1).all()
        optimizer.step()
        model.zero_grad()


def test_a_state_without_copies_is_loaded() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    float32 = MasterAdamW([{"params": [weight]}], 1e-3)
    weight.sum().backward()
    float32.step()
    half = torch.nn.Parameter(weight.detach().bfloat16())
    optimizer = MasterAdamW([{"params": [half]}], 1e-3)
    optimizer.load_state_dict(float32.state_dict())
    half.sum().backward()
    optimizer.step()
    assert half.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_muon_updates_the_matrices_of_layers_and_adamw_the_rest(dtype: torch.dtype, tiny: Make) -> None:
    """The matrices are those of torch's own Muon, and everything else is that of AdamW alone."""
    config, trainers = create_standard_config(2), {}
    for name in ("adamw", "muon"):
        trainers[name] = Trainer(config, 256, execution=Execution(optimizer=name))  # type: ignore[arg-type]
    models = {name: tiny(2).to(dtype) for name in ("adamw", "muon", "torch")}
    gradients = {name: torch.randn_like(p) for name, p in models["muon"].named_parameters()}
    matrices = {name for name, p in models["muon"].named_parameters() if p.ndim == 2 and name.startswith("layers.")}
    own = [p for name, p in models["torch"].float().named_parameters() if name in matrices]
    reference = torch.optim.Muon(own, 1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optimizers = [trainer.create_optimizer(models[name], 1e-2) for name, trainer in trainers.items()]
    for _ in range(2):
        for model in models.values():
            for name, p in model.named_parameters():
                p.grad = gradients[name].to(p.dtype)
        for optimizer in (*optimizers, reference):
            optimizer.step()
    for name, p in models["muon"].named_parameters():
        other = models["torch" if name in matrices else "adamw"].get_parameter(name)
        assert torch.equal(p, other.to(p)), name
    assert not torch.equal(models["muon"].layers[0].ffn.up_proj.weight, models["adamw"].layers[0].ffn.up_proj.weight)


def test_muon_resumes_with_the_same_bits(tiny: Make, text_data: Callable[..., Data]) -> None:
    data, config, ends = text_data(4, 1), create_standard_config(2), []
    trainer = Trainer(config, 256, execution=Execution(optimizer="muon"))
    for kill in (False, True):
        model = tiny(2)
        optimizer = trainer.create_optimizer(model, 3e-3)
        trainer.train_epoch(model, data.train[:2], optimizer)
        if kill:
            state, resumed = copy.deepcopy(optimizer.state_dict()), tiny(2)
            resumed.load_state_dict(model.state_dict())
            model, optimizer = resumed, trainer.create_optimizer(resumed, 1e-9)
            optimizer.load_state_dict(state)
        trainer.train_epoch(model, data.train[2:], optimizer)
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
