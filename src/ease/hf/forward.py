"""The pass of a native model over the tokens of one call, as transformers asks for it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import ModelOutput

from ease.errors import EaseError
from ease.hf.cache import EaseCache, Prefix
from ease.inputs import as_flags, as_ids, as_tensor, check_states, is_integral, unused
from ease.interface import Layout, to_device
from ease.models import StandardTransformer
from ease.routing.forward import routed_forward


def expects_rows(model: nn.Module) -> bool:
    """Whether modules must get whole rows (B, T, D), padding included, and not the tokens that are computed.

    That is so for modules with hooks before their forward, as PEFT adds them for `adapter_names` and activated LoRA.
    """
    return any(module._forward_pre_hooks for module in model.modules())


Output = TypeVar("Output", bound=ModelOutput)

LOSS_OPTIONS = ("num_items_in_batch", "ignore_index", "shift_labels")


def loss_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the loss among further arguments of `forward`; others are refused by name."""
    if refused := unused(arguments, LOSS_OPTIONS):
        raise EaseError(f"forward of this model takes no {', '.join(refused)}: leave it out")
    return {name: value for name, value in arguments.items() if name in LOSS_OPTIONS}


def read_tokens(ids: Any, embeds: Any, attention_mask: Any, position_ids: Any, dim: int) -> tuple[Tensor | None, ...]:
    """Ids (B, T), embeddings (B, T, D), mask and positions of a call as tensors; those left out stay None.

    Raises:
        EaseError: an argument is of another kind.
    """
    ids = None if ids is None else as_ids("input_ids", ids)
    mask = None if attention_mask is None else as_flags("attention_mask", attention_mask)
    positions = None if position_ids is None else as_tensor(position_ids)
    if position_ids is not None and (positions is None or not is_integral(positions)):
        raise EaseError(f"position_ids must be integers, one per token, got {reprlib.repr(position_ids)}")
    if embeds is not None:
        check_states("inputs_embeds", embeds, dim)
    return ids, embeds, mask, positions


def columns_to_keep(logits_to_keep: Any, T: int) -> Tensor:
    """The columns (K,) or (B, K) of T that `logits_to_keep` selects: the last ones, 0 for all, or their indices."""
    columns = torch.arange(T)
    if isinstance(logits_to_keep, int):
        return columns[-logits_to_keep:]
    indices = as_tensor(logits_to_keep)
    if indices is None or not is_integral(indices):
        raise EaseError(f"logits_to_keep must be an integer or indices, got {reprlib.repr(logits_to_keep)}")
    indices = indices.cpu()
    if bool(((indices < -T) | (indices >= T)).any()):
        raise EaseError(f"logits_to_keep must lie below {T}, the number of tokens, got {indices.tolist()}")
    return columns[indices]


def as_asked(output: Output, return_dict: bool | None, config: PreTrainedConfig) -> Output | tuple[Any, ...]:
    """The output of a call as an object or, where `return_dict` or else the configuration says so, as a tuple."""
    return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class LayerRun(GradientCheckpointingLayer):
    """Runs one layer of a native model. transformers turns gradient checkpointing on and off at such modules."""

    def forward(
        self, state: Tensor, model: StandardTransformer, layer: int, layout: Layout | None, prefix: Prefix | None
    ) -> Tensor:
        return model.run(state, layer, layer, layout=layout, cache=prefix)


class Pass(NamedTuple):
    """The result of a pass over T tokens in each of B rows."""

    logits: Tensor
    """(B, K, V) logits of the kept columns."""
    exits: Tensor | None = None
    """(B, T) the layer at which each token left; for padding 0, or -1 in a model with exit 0; None at full depth."""
    hidden_states: tuple[Tensor, ...] | None = None
    """(B, T, D) states before layer 1 and after each layer, the last one normalized for the head; None if not asked
    for. A token that has left keeps its state."""


def full_pass(
    model: StandardTransformer,
    layer_run: LayerRun,
    state: Tensor,
    layout: Layout | None,
    kept: Tensor,
    hidden_states: bool,
    prefix: Prefix | None = None,
) -> Pass:
    """Runs all layers, with gradients.

    Args:
        layer_run: runs the layers one by one where gradient checkpointing is on.
        state: (B, T, D) embeddings.
        kept: (B, K) columns whose logits are computed, on the host.
        hidden_states: whether the states of all layers are returned.
        prefix: keys and values that precede the tokens.
    """
    if layout is not None and expects_rows(model):  # padding becomes a document of its own
        segments = layout.segments
        layout = Layout(layout.positions, torch.where(segments < 0, segments.max() + 1, segments))
    last, states = model.num_layers, [state]
    checkpointing = layer_run.gradient_checkpointing and layer_run.training
    # PEFT's hooks for layers that run again look for adapted modules in the checkpointed one, which has none here.
    if checkpointing and getattr(layer_run, "_peft_gradient_checkpointing_forward_hooks", None):
        raise EaseError("activated LoRA needs every layer to run once: turn gradient checkpointing off")
    if hidden_states or checkpointing:
        for layer in range(1, last + 1):
            state = layer_run(state, model, layer, layout, prefix)
            states.append(state)
    else:
        state = model.run(state, 1, last, layout=layout, cache=prefix)
    normed = model.exit_norm(state, last)
    rows = torch.arange(len(kept), device=normed.device)[:, None]
    logits = model.head_logits(normed[rows, to_device(kept, normed.device)])
    return Pass(logits, hidden_states=(*states[:-1], normed) if hidden_states else None)


@torch.no_grad()
def routed_pass(
    model: StandardTransformer,
    ids: Tensor,
    state: Tensor,
    layout: Layout | None,
    kept: Tensor,
    hidden_states: bool,
    cache: EaseCache | None,
) -> Pass:
    """Runs the tokens as the model's policy allows, each to the exit that it takes.

    Args:
        ids: (B, T) ids, of which only the shape is used.
        state, kept, hidden_states: as in `full_pass`.
        cache: the cache of the tokens before these, to which they are added.
    """
    B, T = ids.shape
    # Which tokens are kept, real or gone is known on the host, so that an exit costs one wait for the device.
    tokens = (torch.arange(B)[:, None] * T + kept).flatten()
    repeated = None
    if kept.shape[1] > 1:
        tokens, repeated = tokens.unique(return_inverse=True)
    logits = model.new_logits(len(tokens) + 1)
    states: list[Tensor] = []
    rows = torch.full((B * T,), len(tokens))  # token -> its row of `logits`; those that are not kept share the last one
    rows[tokens] = torch.arange(len(tokens))
    row_of = to_device(rows, ids.device)

    def read(chunk: Tensor, places: Tensor) -> Tensor:
        logits[row_of[places]] = chunk.to(logits.dtype)
        return chunk[:, :0]

    real = torch.ones(B, T, dtype=torch.bool) if layout is None else layout.host.real
    exits = torch.where(real, model.num_layers, model.first_exit - 1)
    for step in routed_forward(
        model,
        ids,
        model.policy,
        layout=layout,
        read=read,
        required=rows.view(B, T) < len(tokens),
        cache=None if cache is None else cache.native,
        state=state,
        watch=states.append if hidden_states else None,
    ):
        exits[step.arrived & ~step.remaining] = step.layer
    if cache is not None:
        cache.real = torch.cat([cache.real, real], 1)
    exits = to_device(exits, ids.device)
    logits = logits[:-1] if repeated is None else logits[to_device(repeated, ids.device)]
    return Pass(
        logits.view(*kept.shape, logits.shape[1]),
        exits if model.policy.exits else None,
        _normed_at_exits(model, states, exits) if hidden_states else None,
    )


def _normed_at_exits(model: StandardTransformer, states: list[Tensor], exits: Tensor) -> tuple[Tensor, ...]:
    """States of L + 1 places, the last one normalized by the exit that each token took."""
    states += states[-1:] * (model.num_layers + 1 - len(states))  # layers that no token ran
    normed = model.exit_norm(states[-1], model.num_layers)
    for exit in model.policy.exits:
        left = exits == exit
        normed[left] = model.exit_norm(states[-1][left], exit)
    return (*states[:-1], normed)


def after_prefix(
    places: int, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Mask and positions of the tokens after a prefix, counted from its end.

    Args:
        places: places P of the prefix.
        attention_mask: (B, P + T).
        position_ids: (B, T), counted from the beginning of the prefix.

    Raises:
        EaseError: the mask hides a part of the prefix.
    """
    if attention_mask is not None and not bool(attention_mask[:, :places].all()):
        raise EaseError(f"attention_mask must be 1 for the {places} places of the prefix in past_key_values")
    return (
        None if attention_mask is None else attention_mask[:, places:],
        None if position_ids is None else position_ids - places,
    )


def make_layout(ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Layout | None:
    """The layout (B, T) of rows with an attention mask or positions.

    None for rows without padding that hold one document each, which run fastest without a layout.
    """
    if attention_mask is None and position_ids is None:
        return None
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    if mask.shape != ids.shape:
        raise EaseError(f"attention_mask must have the shape {tuple(ids.shape)} of the ids, got {tuple(mask.shape)}")
    layout = Layout.from_attention_mask(mask)
    if position_ids is not None:
        if position_ids.shape not in (ids.shape, ids.shape[1:], (1, ids.shape[1])):
            raise EaseError(
                f"position_ids must have the shape {tuple(ids.shape)} of the ids, got {tuple(position_ids.shape)}"
            )
        positions = position_ids.expand_as(ids)
        documents = (layout.real & (positions == 0)).cumsum(1)
        layout = Layout(positions, torch.where(layout.real, documents, -1))
    default = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return None if bool(layout.real.all()) and torch.equal(layout.positions, default) else layout
