"""How often the host waits for a device: per training step, per decoded token and per scored batch.

Counted on a pretended device (`fake_device.py`), which also refuses tensors that were left on the host, and on which
everything gives the results of the CPU.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_device import DEVICE, DeviceTensor, FakeDevice
from fake_device import fake_device as fake_device
from torch import Tensor

import ease
from ease.evaluation.tasks import predict
from ease.hf.model import EaseForCausalLM
from ease.interface import evaluation_view
from ease.training.losses import Distillation, chunk_rows
from ease.training.selection import LearnedGate, LeastConfident

VOCAB, LAYERS = 32, 4
POLICY = ease.Policy((1, 2), (0.05, 0.05))
THREE_EXITS = [ease.StageConfig((layer, layer)) for layer in (1, 2, 4)]


@pytest.fixture
def models(tiny: Callable[..., Any], fake_device: FakeDevice) -> tuple[ease.StandardTransformer, ...]:
    """The same model on the CPU and on the device."""
    pair = [tiny(LAYERS, vocab_size=VOCAB, num_kv_heads=2).double() for _ in range(2)]
    for model in pair:
        model.policy, model.trained_exits = POLICY, {1, 2, 4}
        model.set_classifiers({exit: torch.linspace(-1, exit, model.config.dim + 1) for exit in (1, 2)})
    pair[1].to(DEVICE)
    assert isinstance(pair[1].output_head.weight, DeviceTensor)
    fake_device.waits.clear()
    return tuple(pair)


def batches(count: int, *, padded: bool = False) -> list[ease.Batch]:
    torch.manual_seed(1)
    made = []
    for _ in range(count):
        x, y = torch.randint(VOCAB, (2, 6, 16))
        y[:, :2] = -100
        mask = torch.arange(16) < torch.randint(4, 17, (6, 1))
        made.append(ease.Batch(x, y, layout=ease.Layout.from_attention_mask(mask) if padded else None))
    return made


def on_cpu(value: Any) -> Any:
    return value.inner if isinstance(value, DeviceTensor) else value


def per_unit(device: FakeDevice, units: int) -> float:
    return sum(device.waits.values()) / units


@pytest.mark.parametrize(
    ("config", "padded", "most"),
    [
        ({"layer_weights": {LAYERS: 1.0}}, False, 1),
        ({"stages": THREE_EXITS}, False, 1),
        ({"stages": THREE_EXITS}, True, 1),
        ({"stages": THREE_EXITS, "objective": Distillation(2.0, 0.5)}, True, 1),
        ({"stages": THREE_EXITS, "selection": LeastConfident({2: 0.5})}, True, 2),  # and once where tokens are selected
        ({"stages": THREE_EXITS, "selection": LearnedGate({1: 0.5, 2: 0.5})}, True, 3),
    ],
)
def test_a_training_step_waits_once(
    config: dict[str, Any], padded: bool, most: int, models: Any, fake_device: FakeDevice
) -> None:
    losses = []
    for model in models:
        trainer = ease.Trainer(ease.TrainingConfig(**config), VOCAB)
        optimizer = trainer.create_optimizer(model, 1e-2)
        fake_device.waits.clear()
        torch.manual_seed(4)
        losses.append(trainer.train_epoch(model, batches(4, padded=padded), optimizer))
    assert per_unit(fake_device, 4) <= most
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)  # a gate's loss is computed in float32


def test_a_step_on_mined_tokens_waits_twice(models: Any, fake_device: FakeDevice) -> None:
    losses = []
    for model in models:
        fake_device.waits.clear()
        mined = ease.MinedBatches(model, batches(4), ease.Policy(), 0.5)
        assert per_unit(fake_device, 4) <= 1
        torch.manual_seed(2)
        model.grow(LAYERS + 1)
        trainer = ease.Trainer(ease.create_standard_config(LAYERS + 1), VOCAB)
        model.freeze_below(LAYERS + 1)
        optimizer = trainer.create_optimizer(model, 1e-2)
        fake_device.waits.clear()
        steps = list(trainer._steps(trainer._engine(model, optimizer), mined, LAYERS + 1))
        assert per_unit(fake_device, len(steps)) <= 2
        losses.append([step.loss for step in steps])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


@pytest.mark.parametrize(
    ("mode", "options", "most"),
    [
        ("full", {}, 2),
        ("full", {"temperature": 1.0, "top_p": 0.9}, 3),
        ("routed", {}, 4),
        ("exact", {"draft_exit": 2, "draft_confidence": 0.2}, 4),
        ("exact", {"draft_exit": 2, "draft_confidence": 0.2, "repetition_penalty": 1.2}, 4),
        ("exact", {"draft_exit": 2, "draft_confidence": 0.2, "temperature": 1.0}, 4),
        ("exact", {"draft_source": "lookup", "draft_confidence": 0.2}, 2),
        ("exact", {"draft_source": "brick", "draft_confidence": 0.001}, 4),
        ("exact", {"draft_source": "lookup", "draft_confidence": 0.2, "temperature": 1.0}, 4),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_a_decoded_token_waits_at_most_four_times(
    mode: Any, options: dict[str, Any], most: int, padded: bool, models: Any, fake_device: FakeDevice
) -> None:
    (batch,) = batches(1, padded=True)
    mask = batch.layout.real if padded and batch.layout is not None else None
    results = []
    for model in models:
        torch.manual_seed(3)
        if options.get("draft_source") == "brick":
            states = torch.randn(64, model.config.dim).double().to(model.embedding.weight.device)
            model.add_draft_brick(torch.arange(VOCAB - 1), states)
        fake_device.waits.clear()
        results.append(ease.generate(model, batch.x, 20, mode, attention_mask=mask, stop=7, max_memory=1e9, **options))
    longest = int((results[1].exits > 0).sum(1).max())
    assert per_unit(fake_device, longest) <= most
    if not options.get("temperature"):  # else the device draws other numbers
        assert torch.equal(results[0].tokens, results[1].tokens)
        assert torch.equal(results[0].exits, results[1].exits)
        torch.testing.assert_close(results[0].confidences, results[1].confidences)


@pytest.mark.parametrize(("policy", "most"), [(ease.Policy(), 2), (POLICY, 4)])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_token_through_the_class_of_transformers_waits_twice_and_at_each_early_exit(
    policy: ease.Policy, most: int, padded: bool, models: Any, fake_device: FakeDevice
) -> None:
    """The calls of transformers' `generate`, which itself makes tensors that this device cannot: one wait is for the
    check of the mask's values, one to read it."""
    (batch,) = batches(1, padded=True)
    assert batch.layout is not None
    texts = []
    for model in models:
        model.policy = policy
        wrapped, device = EaseForCausalLM.wrap(model.eval()), model.embedding.weight.device
        mask = (batch.layout.real.flip(1) if padded else torch.ones_like(batch.x)).long().to(device, non_blocking=True)
        ids, text, cache = batch.x.to(device, non_blocking=True), [], None
        for _ in range(5):
            fake_device.waits.clear()
            out = wrapped(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1, use_cache=True)
            assert cache is None or per_unit(fake_device, 1) <= most
            ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            text.append(on_cpu(ids))
        texts.append(torch.cat(text, 1))
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    ("policy", "most"),
    [
        (ease.Policy(), 0),
        (POLICY, 2 * 2),
        (ease.Policy((1, 2), (0.05, 0.05), always_deep=2), 2 * 2),
        (ease.Policy.patient((1, 2), 2), 2 * 2),
        (ease.Policy((1, 2), (0.5, 0.5), "steadiness"), 2 * 2),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_a_scored_batch_waits_twice_at_an_early_exit(
    policy: ease.Policy, most: int, padded: bool, models: Any, fake_device: FakeDevice
) -> None:
    scores = []
    for model in models:
        fake_device.waits.clear()
        scores.append(ease.score(model, batches(3, padded=padded), policy))
    assert sum(fake_device.waits.values()) <= 3 * most + 1  # and one to read the result
    torch.testing.assert_close(scores[1].losses, scores[0].losses)
    assert torch.equal(scores[1].exits, scores[0].exits)
    assert torch.equal(scores[1].correct, scores[0].correct)
    assert scores[1].flops == scores[0].flops


def test_ids_on_the_host_are_moved_to_the_model(models: Any, fake_device: FakeDevice) -> None:
    (batch,) = batches(1, padded=True)
    assert batch.layout is not None
    routed = [ease.route(model, batch.x, policy=POLICY, attention_mask=batch.layout.real) for model in models]
    predicted = [predict(model, batch.x, batch.layout, POLICY) for model in models]
    for cpu, device in (routed, predicted):
        for expected, found in zip(cpu, device, strict=True):
            assert isinstance(found, DeviceTensor)
            torch.testing.assert_close(on_cpu(found), expected)
    with pytest.raises(ease.EaseError, match="token ids must lie in"):
        ease.route(models[1], batch.x + VOCAB)


def test_calibration_and_classifiers_run_on_a_device(models: Any, fake_device: FakeDevice) -> None:
    found = []
    for model in models:
        ease.learn_agreement(model, batches(2), (1,), steps=3)
        policy = ease.Policy((1,), (1.0,), confidence="classifier")
        found.append(ease.calibrate(model, policy, ease.Target("min_agreement", 0.0), *(batches(2),) * 3))
        assert evaluation_view(model).output_head.weight is model.output_head.weight
    assert found[1].policy.thresholds == pytest.approx(found[0].policy.thresholds)


def test_the_count_sees_what_waits(fake_device: FakeDevice) -> None:
    there = torch.arange(3.0).to(DEVICE)
    uses: list[Callable[[Tensor], Any]] = [
        lambda t: t[0].item(),
        lambda t: bool((t > 1).any()),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t.nonzero(),
        lambda t: t[t > 1],
        lambda t: torch.equal(t, t),
        lambda t: torch.arange(3).to(DEVICE),
        lambda t: t.repeat_interleave(t.long()),
        lambda t: t.unique(),
    ]
    for use in uses:
        fake_device.waits.clear()
        use(there)
        assert sum(fake_device.waits.values()) == 1
    fake_device.waits.clear()
    (there * 2).sum().add_(there.argmax()).masked_fill(there > 1, 0.0)
    torch.arange(3).to(DEVICE, non_blocking=True)
    assert not fake_device.waits
    with pytest.raises(RuntimeError, match="mixes"):
        there + torch.arange(3)


def test_more_logits_exist_at_a_time_on_a_device(models: Any) -> None:
    on_host, there = (chunk_rows(model.output_head.weight) for model in models)
    assert there == 2**6 * on_host
