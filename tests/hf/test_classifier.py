"""A native classifier under the tools of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ease
from ease.errors import EaseError
from ease.models import DeepSupervisionTransformer
from ease.policy import Policy
from ease.routing.forward import route

transformers = pytest.importorskip("transformers")

from ease.hf.classifier import EaseForSequenceClassification  # noqa: E402
from ease.hf.model import EaseConfig, EaseForCausalLM  # noqa: E402

V, L, LABELS = 97, 3, 4


@pytest.fixture
def native() -> DeepSupervisionTransformer:
    model = DeepSupervisionTransformer(V, 32, L, 4, num_labels=LABELS).double().eval()
    with torch.no_grad():
        model.output_head.weight *= 20
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, V, (8, 12))


def test_the_last_token_of_each_row_decides_whatever_the_padding(
    native: DeepSupervisionTransformer, ids: torch.Tensor
) -> None:
    model = EaseForSequenceClassification.wrap(native, pad_token_id=0)
    expected, padding = native(ids)[:, -1], torch.zeros(8, 3, dtype=torch.long)
    assert torch.equal(model(ids).logits, expected)
    for padded in (torch.cat([ids, padding], 1), torch.cat([padding, ids], 1)):
        torch.testing.assert_close(model(padded).logits, expected)
        mask = (padded != 0).long()
        model.config.pad_token_id = None
        torch.testing.assert_close(model(padded, attention_mask=mask).logits, expected)
        model.config.pad_token_id = 0
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected)


def test_sequences_leave_as_in_the_native_model(native: DeepSupervisionTransformer, ids: torch.Tensor) -> None:
    model = EaseForSequenceClassification.wrap(native)
    confidences = route(native, ids, exit_layer=1, routing_threshold=1e-9).confidences[:, -1]
    model.set_routing(confidences.median().item(), [1])
    expected = route(native, ids)
    out = model(ids, output_hidden_states=True)
    assert torch.equal(out.logits, expected.logits[:, -1])
    assert torch.equal(out.exits, expected.exits[:, -1])
    assert len(out.exits.unique()) == 2
    torch.testing.assert_close(native.output_head(out.hidden_states[-1][:, -1]), out.logits)
    assert model.train()(ids).exits is None, "training is at full depth"


def test_the_auto_class_and_the_native_loader_read_a_saved_classifier(
    native: DeepSupervisionTransformer, ids: torch.Tensor, tmp_path: Path
) -> None:
    names = dict(enumerate("abcd"))
    model = EaseForSequenceClassification.wrap(native, id2label=names)
    model.set_routing(0.5, [1])
    model.save_pretrained(tmp_path)
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(back) is EaseForSequenceClassification
    assert back.config.id2label == names
    assert back.policy == Policy((1,), (0.5,))
    assert torch.equal(back(ids).logits, model(ids).logits)
    assert torch.equal(ease.from_pretrained(tmp_path)(ids), native(ids))


def test_a_new_classifier_has_the_labels_of_its_configuration(ids: torch.Tensor) -> None:
    config = EaseConfig(vocab_size=V, hidden_size=32, num_labels=5, tie_word_embeddings=True)
    model = EaseForSequenceClassification(config)
    assert model(ids).logits.shape == (8, 5)
    model.resize_token_embeddings(V + 3)
    assert model(ids + 3).logits.shape == (8, 5), "a new vocabulary leaves the head alone"
    labels = torch.arange(8) % 5
    loss = model(ids, labels=labels).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(model(ids).logits, labels))
    model.config.problem_type = None
    several = torch.ones(8, 5)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(model(ids).logits, several)
    torch.testing.assert_close(model(ids, labels=several).loss, expected)


def test_labels_are_read_in_every_form_or_refused(native: DeepSupervisionTransformer, ids: torch.Tensor) -> None:
    model = EaseForSequenceClassification.wrap(native)
    labels = torch.zeros(len(ids), dtype=torch.long)
    expected = model(ids, labels=labels).loss
    for form in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.int):
        torch.testing.assert_close(model(ids, labels=form(labels)).loss, expected)
    for wrong, message in (("ab", "labels must be"), (labels[1:], "labels must be"), (labels + 99, "must lie in")):
        with pytest.raises(EaseError, match=message):
            model(ids, labels=wrong)


def test_a_trainer_trains_a_classifier(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = EaseForSequenceClassification(EaseConfig(vocab_size=V, hidden_size=32, num_labels=2))
    rows = [{"input_ids": torch.full((6,), 1 + label), "labels": label} for label in (0, 1)] * 8
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=12,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        label_smoothing_factor=0.1,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    found = trainer.predict(rows).predictions.argmax(-1)
    assert found.tolist() == [0, 1] * 8


def test_models_of_the_other_task_are_refused(native: DeepSupervisionTransformer, tmp_path: Path) -> None:
    language = DeepSupervisionTransformer(V, 32, 2, 4)
    EaseForCausalLM.wrap(language).save_pretrained(tmp_path / "language")
    EaseForSequenceClassification.wrap(native).save_pretrained(tmp_path / "classifier")
    ease.save_pretrained(language, tmp_path / "stock")
    for refused in (
        lambda: EaseForSequenceClassification.wrap(language),
        lambda: EaseForSequenceClassification.from_pretrained(tmp_path / "language"),
        lambda: EaseForSequenceClassification.from_pretrained(tmp_path / "stock"),
    ):
        with pytest.raises(EaseError, match="this model predicts tokens"):
            refused()
    for refused in (
        lambda: EaseForCausalLM.wrap(native),
        lambda: EaseForCausalLM.from_pretrained(tmp_path / "classifier"),
    ):
        with pytest.raises(EaseError, match="use EaseForSequenceClassification"):
            refused()
