"""The base model of an `EaseForCausalLM`: what trainers call that compute the logits themselves, chunk by chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from ease.hf.forward import as_asked

if TYPE_CHECKING:
    from ease.hf.model import EasePreTrainedModel


class Backbone(nn.Module):
    """A view of a model without its head, with the same modules.

    Args:
        model: the model.
    """

    def __init__(self, model: EasePreTrainedModel) -> None:
        super().__init__()
        self._model = [model]  # in a list, so that it is no submodule
        for name, module in model.model.named_children():
            if name != "output_head":
                self.add_module(name, module)
        self.training = model.training

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """ids (B, T) -> states (B, T, D), normalized for the head.

        In evaluation mode tokens leave as the policy allows: the head gives the logits of the exit that a token took.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states,
                output_attentions, return_dict: as in `EaseForCausalLM.forward`.

        Raises:
            EaseError: an argument is missing, not supported, or does not fit the ids or the cache.
        """
        model = self._model[0]
        result, cache = model._run(
            lambda ids, _: torch.zeros(len(ids), 0, dtype=torch.long),
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            True,
            output_attentions,
        )
        states = result.hidden_states
        wanted = model.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutputWithPast(
            last_hidden_state=None if states is None else states[-1],
            past_key_values=cache,
            hidden_states=states if wanted else None,
        )
        return as_asked(output, return_dict, model.config)
