"""A native classifier of sequences as a transformers model."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from ease.errors import EaseError
from ease.hf.configuration import EaseConfig
from ease.hf.folder import NATIVE
from ease.hf.forward import as_asked, loss_options
from ease.hf.model import EasePreTrainedModel
from ease.inputs import IGNORE, as_ids, as_tensor, is_integral
from ease.interface import Layout
from ease.models import DeepSupervisionTransformer


@dataclass
class EaseClassifierOutput(SequenceClassifierOutputWithPast):
    """The output of transformers' classifiers, with the exits of a routed pass.

    Args:
        exits: (B,), the layer at which each sequence left; None at full depth.
    """

    exits: Tensor | None = None


class EaseForSequenceClassification(EasePreTrainedModel):
    """A native classifier (`ModelConfig.num_labels`) behind the interface of transformers.

    The last token of a sequence decides. In evaluation mode sequences leave as the policy allows (`set_routing`); in
    training mode the model runs at full depth, with the loss of the final exit.

    Args:
        config: shape, policy and special tokens. Its `num_labels` is the number of classes.
        model: a native model to use instead of a new one of that shape.

    Attributes:
        model: the native model.
        policy: where sequences leave in evaluation mode.

    Raises:
        EaseError: the model is no classifier.

    Example:
        >>> model = EaseForSequenceClassification.wrap(classifier, id2label={0: "bad", 1: "good"})
        >>> model.save_pretrained("reviews")
    """

    classifies = True
    _tied_weights_keys = None  # type: ignore[assignment]

    def __init__(self, config: EaseConfig, model: DeepSupervisionTransformer | None = None) -> None:
        if model is None:
            model = config.build(num_labels=config.num_labels, tie_embeddings=False)
        super().__init__(config, model)

    def get_output_embeddings(self) -> nn.Module | None:
        return None  # the head gives labels, so that a new vocabulary leaves it alone

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> EaseClassifierOutput | tuple[Any, ...]:
        """ids (B, T) -> logits (B, num_labels).

        Args:
            input_ids: (B, T) ids.
            attention_mask: (B, T), 1 for real tokens, 0 for padding on either side. By default the ids other than
                `config.pad_token_id` are real, and all where there is no such id.
            position_ids: (B, T).
            inputs_embeds: (B, T, D) embeddings instead of `input_ids`.
            labels: (B,) classes; (B, num_labels) floats for several labels at once.
            output_hidden_states, output_attentions, return_dict: as in `EaseForCausalLM.forward`.
            kwargs: arguments of the loss, as in `EaseForCausalLM.forward`.

        Raises:
            EaseError: an argument is missing, not supported, or does not fit the ids.
        """
        options = loss_options(kwargs)
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            input_ids = as_ids("input_ids", input_ids)
            attention_mask = input_ids != self.config.pad_token_id

        def last_token(ids: Tensor, layout: Layout | None) -> Tensor:
            T = ids.shape[1]
            if layout is None:
                return torch.full((len(ids), 1), T - 1)
            return (layout.host.real * torch.arange(T)).amax(1, keepdim=True)

        result, _ = self._run(
            last_token,
            input_ids,
            attention_mask,
            position_ids,
            None,
            inputs_embeds,
            False,
            output_hidden_states,
            output_attentions,
        )
        logits, loss = result.logits[:, 0], None
        if labels is not None:
            labels = self._read_labels(labels, logits)
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **options)
        output = EaseClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=result.hidden_states,
            exits=None if result.exits is None else result.exits.amax(1),
        )
        return as_asked(output, return_dict, self.config)

    def _read_labels(self, given: Any, logits: Tensor) -> Tensor:
        """Labels (B,) or (B, num_labels) as a tensor; refuses other shapes, and classes that there are not."""
        labels = as_tensor(given)
        if labels is None or labels.dtype == torch.bool or labels.shape not in (logits.shape[:1], logits.shape):
            raise EaseError(
                f"labels must be classes ({len(logits)},) or numbers {tuple(logits.shape)}, got "
                f"{reprlib.repr(given) if labels is None else tuple(labels.shape)}"
            )
        if is_integral(labels):
            labels = labels.long()
            if labels.ndim == 1 and logits.shape[1] > 1 and labels.device.type == "cpu":
                self.model.check_ids(labels[labels != IGNORE], logits.shape[1])
        return labels


MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[NATIVE] = EaseForSequenceClassification.__name__

AutoModelForSequenceClassification.register(EaseConfig, EaseForSequenceClassification, exist_ok=True)
