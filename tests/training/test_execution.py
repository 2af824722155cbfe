"""What each setting of execution does to the loss, and that it leaves the model as it was."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ease import (
    ASHEMConfig,
    Data,
    EaseError,
    Execution,
    Phase,
    PhaseOptions,
    StageConfig,
    StandardTransformer,
    Trainer,
    TrainingConfig,
    create_deep_supervision_config,
    create_standard_config,
    train,
)
from ease.interface import call_layer, to_device
from ease.progress import Progress, StepMetrics
from ease.training import checkpoint, execution
from ease.training.losses import Distillation
from ease.training.selection import LearnedGate

# Two warnings inside of torch.compile, which torch hides unless warnings are errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

Make = Callable[..., StandardTransformer]

EXITS = create_deep_supervision_config(3)
CONFIGS = {
    "exits": EXITS,
    "distillation": TrainingConfig([StageConfig((1, 3))], objective=Distillation(2.0, 0.5)),
    "gate": TrainingConfig([StageConfig((1, 3))], selection=LearnedGate({1: 0.5})),
}


def losses(model: StandardTransformer, data: Data, execution: Execution, config: TrainingConfig = EXITS) -> list[float]:
    """The loss of every epoch."""
    trainer = Trainer(config, 256, execution=execution)
    optimizer = trainer.create_optimizer(model, 3e-3)
    torch.manual_seed(1)
    return [trainer.train_epoch(model, data.train, optimizer) for _ in range(3)]


@pytest.fixture
def _compiled_without_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile up to the code of a kernel, which takes long to make."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    execution.layer_call.cache_clear()
    torch._dynamo.reset()
    yield
    execution.layer_call.cache_clear()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_half_precision_trains_like_float32(
    config: TrainingConfig, precision: Any, tiny: Make, text_data: Callable[..., Data]
) -> None:
    models = [tiny(3) for _ in range(2)]
    if config.selection.classifiers:
        for model in models:
            model.set_classifiers({1: torch.zeros(33)})
    data = text_data(6, 1)
    full, half = (
        losses(model, data, Execution(precision=name), config) for model, name in zip(models, ("float32", precision))
    )
    assert half != full
    # A gate chooses other tokens as soon as two confidences are rounded to the same number.
    assert half == pytest.approx(full, rel=2e-2 if config.selection.classifiers else 5e-3)
    assert all(p.dtype == torch.float32 for p in models[1].parameters())


def test_products_run_in_the_chosen_precision(tiny: Make, text_data: Callable[..., Data]) -> None:
    model, seen = tiny(2), set[torch.dtype]()
    model.layers[1].ffn.down_proj.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    data = text_data(2, 1)
    for name in ("float32", "bf16", "fp16"):
        losses(model, data, Execution(precision=name), create_standard_config(2))  # type: ignore[arg-type]
    assert seen == {torch.float32, torch.bfloat16, torch.float16}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_checkpointed_activations_give_the_same_bits(
    config: TrainingConfig, tiny: Make, text_data: Callable[..., Data]
) -> None:
    ends, data = [], text_data(4, 1)
    for keep in (False, True):
        model = tiny(3, dropout=0.2)
        if config.selection.classifiers:
            model.set_classifiers({1: torch.zeros(33)})
        ends.append((losses(model, data, Execution(activation_checkpointing=keep), config), model.state_dict()))
    (plain, weights), (kept, others) = ends
    assert kept == plain
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_checkpointed_activations_are_not_kept(tiny: Make) -> None:
    x = torch.randint(256, (4, 32))
    sizes = []
    for keep in (False, True):
        model, size = tiny(4).train(), []

        def pack(tensor: Tensor, size: list[int] = size) -> Tensor:
            size.append(tensor.numel())
            return tensor

        with (
            Execution(activation_checkpointing=keep).applied(model),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            model(x)
        sizes.append(sum(size))
    assert sizes[1] < sizes[0] / 5


@pytest.mark.usefixtures("_compiled_without_code")
@pytest.mark.parametrize("keep", [False, True], ids=["", "checkpointed"])
def test_compiled_layers_train_alike_and_growth_compiles_new_shapes_only(
    keep: bool, tiny: Make, text_data: Callable[..., Data]
) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    data = text_data(4, 1)
    how = Execution(compile=True, activation_checkpointing=keep)
    assert losses(tiny(3), data, how) == pytest.approx(losses(tiny(3), data, Execution()), rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 1  # of all three layers
    assert not counters["graph_break"]
    grown = tiny(3).grow(6, "copy")
    losses(grown, data, how, create_standard_config(6))
    assert counters["stats"]["unique_graphs"] == 1
    assert grown.call_layer is call_layer


@pytest.mark.usefixtures("_compiled_without_code")
def test_compiled_phases_with_a_trunk_and_active_tokens(tiny: Make, text_data: Callable[..., Data]) -> None:
    ends = []
    for how in (Execution(), Execution(compile=True)):
        strategy = ASHEMConfig(phase1_max_epochs=1, phase2_max_epochs=2, phase2_lr=1e-3).strategy()
        histories = [history for _, history in train(tiny(2), strategy, text_data(4, 1), execution=how)]
        ends.append([loss for history in histories for loss in history.column("val_loss")])
    assert ends[1] == pytest.approx(ends[0], rel=1e-5)


@pytest.mark.slow
def test_compiled_code_trains_alike(tiny: Make, text_data: Callable[..., Data]) -> None:
    data = text_data(2, 1)
    assert losses(tiny(3), data, Execution(compile=True)) == pytest.approx(losses(tiny(3), data, Execution()), rel=1e-4)


def test_a_failure_to_compile_is_one_sentence(
    tiny: Make, text_data: Callable[..., Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    execution.layer_call.cache_clear()
    torch._dynamo.reset()
    with pytest.raises(EaseError, match=r"^torch.compile failed \(.*\): leave out compile$"):
        losses(tiny(1), text_data(2, 1), Execution(compile=True), create_standard_config(1))
    execution.layer_call.cache_clear()


class Killed(BaseException):
    pass


class Killer(Progress):
    def step(self, fraction: float, metrics: StepMetrics | None = None) -> None:
        if metrics and metrics.step == 3:
            raise Killed


def test_the_scale_of_fp16_is_resumed(
    tiny: Make, text_data: Callable[..., Data], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    scale = Execution.scaler
    # Far too large, so that the first steps overflow and the scale falls.
    monkeypatch.setattr(Execution, "scaler", lambda self, device: raised(scale(self, device)))
    data, ends = text_data(6, 1), []
    for file, kill in ((None, False), (tmp_path / "phase.safetensors", True), (tmp_path / "phase.safetensors", False)):
        model, config = tiny(2), create_standard_config(2)
        phase = Phase("one", config, data.train, data.val, PhaseOptions(max_epochs=2, lr=1e-2))
        trainer = Trainer(config, 256, execution=Execution(precision="fp16"))
        if kill:
            with pytest.raises(Killed):
                trainer.run(model, phase, Killer(), file)
            saved = checkpoint.read_state(tmp_path / "phase.safetensors")
            assert saved["engine"]["scaler"]["scale"] < 2.0**24
            continue
        history = trainer.run(model, phase, checkpoint=file)
        ends.append((history.skipped, history.column("train_loss"), copy.deepcopy(model.state_dict())))
    (skipped, curve, weights), (again, other, others) = ends
    assert skipped == again > 0
    assert curve == other
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def raised(scaler: Any) -> Any:
    scaler._init_scale = 2.0**24
    return scaler


def test_fp16_refuses_weights_in_half_precision(tiny: Make, text_data: Callable[..., Data]) -> None:
    with pytest.raises(EaseError, match="precision fp16 is for float32 weights"):
        losses(tiny(3).bfloat16(), text_data(1, 1), Execution(precision="fp16"))


def test_a_profile_is_a_trace_of_every_phase(tiny: Make, text_data: Callable[..., Data], tmp_path: Path) -> None:
    strategy = ASHEMConfig(phase1_max_epochs=2, phase2_max_epochs=2).strategy()
    list(train(tiny(2), strategy, text_data(4, 1), execution=Execution(profile=str(tmp_path / "traces"))))
    traces = sorted(path.name for path in (tmp_path / "traces").iterdir())
    assert traces == ["phase-1.json", "phase-2.json"]
    assert json.loads((tmp_path / "traces" / "phase-1.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Execution(batch_tokens=0), "batch_tokens must be"),
        (lambda: Execution(precision="fp8"), "precision must be"),  # type: ignore[arg-type]
        (lambda: Execution(compile=1), "compile must be"),  # type: ignore[arg-type]
    ],
)
def test_wrong_settings_are_refused(make: Callable[[], Execution], message: str) -> None:
    with pytest.raises(EaseError, match=message):
        make()


def test_host_tensors_are_pinned_on_their_way_to_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: calls.append("pin") or self)
    monkeypatch.setattr(Tensor, "to", lambda self, device, **options: calls.append((device, options)) or self)
    to_device(torch.zeros(2), "cuda")
    assert calls == ["pin", ("cuda", {"non_blocking": True})]
    calls.clear()
    to_device(torch.zeros(2), "cpu")
    assert "pin" not in calls
