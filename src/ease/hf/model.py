"""The native model as a transformers model: `generate`, `Trainer`, pipelines, saving and LoRA work on it.

- Importing this module registers `EaseForCausalLM` with the Auto classes, under the model type "ease".
- `save_pretrained` of this class writes the native parameter names, from which a `Trainer` resumes. For a folder that
  stock transformers loads, use `ease.save_pretrained(model.model, folder)`.
- Depth and policy belong to the native model. The config records them when the model is saved; changing the config
  changes neither.
- `generate` reads every token once, into the model's own cache (`ease.hf.cache`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ease.errors import EaseError, first_line, require
from ease.hf.checkpoint import from_pretrained, read_configuration
from ease.hf.folder import CONFIG, FIX, NATIVE, read_json
from ease.hf.options import read_options
from ease.hf.prompting import TOKEN_IDS, token_ids
from ease.hf.weights import DTYPES
from ease.interface import Layout
from ease.models import DeepSupervisionTransformer
from ease.policy import Policy
from ease.routing.forward import routed_forward
from ease.storage import check_finite

try:
    from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from ease.hf.cache import EaseCache
    from ease.hf.configuration import EaseConfig, config_of
    from ease.hf.generation import EaseGenerationMixin
except ImportError:
    require("transformers", "hf")
    raise


@dataclass
class EaseOutput(CausalLMOutputWithPast):
    """The output of transformers' causal models, with the exits of a routed pass.

    Args:
        exits: (B, T), the layer at which each token left, 0 for padding; None at full depth. With a cache, T counts the
            tokens of this call, as in `logits`.
    """

    exits: Tensor | None = None


class EaseForCausalLM(PreTrainedModel, EaseGenerationMixin):
    """A native model behind the interface of transformers.

    In evaluation mode tokens leave as the policy allows (`set_routing`); in training mode the model runs at full depth,
    with the loss of the final exit.

    Args:
        config: shape, policy and special tokens.
        model: a native model to use instead of a new one of that shape.

    Attributes:
        model: the native model.
        policy: where tokens leave in evaluation mode.

    Example:
        >>> model = ease.EaseForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        >>> model.set_routing(0.9, exits=[15, 20])
        >>> model.generate(ids, max_new_tokens=64)
    """

    config_class = EaseConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _tied_weights_keys = {"model.output_head.weight": "model.embedding.weight"}  # noqa: RUF012

    model: DeepSupervisionTransformer

    def __init__(self, config: EaseConfig, model: DeepSupervisionTransformer | None = None) -> None:
        super().__init__(config)
        if model is None:
            model = DeepSupervisionTransformer(**(config.model or {}))
            model.policy = Policy.of(config.exits, config.thresholds, **(config.policy_options or {}))
            model.policy.check(model.num_layers)
            model.trained_exits = set(config.trained_exits)
        self.model = model
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Keeps the initial values that the native model's constructor set."""

    @classmethod
    def wrap(cls, model: DeepSupervisionTransformer, **token_ids: Any) -> Self:
        """Wraps a native model, which is shared and not copied.

        Args:
            model: the native model.
            token_ids: bos_token_id, eos_token_id and pad_token_id.
        """
        wrapped = cls(EaseConfig(**config_of(model), dtype=next(model.parameters()).dtype, **token_ids), model)
        wrapped.train(model.training)
        return wrapped

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *model_args: Any, **kwargs: Any
    ) -> Self:
        """Loads a folder that this class saved, or any checkpoint that `ease.from_pretrained` reads.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the Hugging Face hub.
            kwargs: the options of `ease.from_pretrained`; `bos_token_id`, `eos_token_id` and `pad_token_id`, which
                replace those of the checkpoint; `output_loading_info`; and for a folder of this class `config`.

        Raises:
            EaseError: the checkpoint is missing, damaged or not supported, or an argument is not.
        """
        if model_args:
            raise EaseError("from_pretrained takes one argument without a name: the folder, or the name on the hub")
        config = kwargs.get("config")
        if isinstance(config, EaseConfig):  # the Auto classes put this option there
            kwargs.setdefault("attn_implementation", config._attn_implementation)
        also = (*TOKEN_IDS, "output_loading_info", "config", "adapter_kwargs")
        folder, dtype, device = read_options(pretrained_model_name_or_path, kwargs, also=also)
        raw = read_json(folder / CONFIG)
        given = {name: kwargs[name] for name in also if kwargs.get(name) is not None}
        if raw.get("model_type") == NATIVE:
            read_configuration(folder)  # refuses sizes that do not fit the weights, before transformers makes a model
            loaded: Any = super().from_pretrained(folder, dtype=dtype or "auto", **given)
            model: Self = loaded[0] if given.get("output_loading_info") else loaded
            for name, parameter in model.named_parameters():
                if parameter.dtype in DTYPES.values() and not parameter.is_meta:
                    check_finite(name, parameter, folder, FIX)
            model.to(device)  # type: ignore[arg-type]
            return cast(Self, loaded)
        if refused := sorted(given.keys() & {"config", "adapter_kwargs"}):
            raise EaseError(f"{', '.join(refused)} is not supported for this checkpoint: leave it out")
        model = cls.wrap(
            from_pretrained(folder, dtype=dtype, device=device),
            **token_ids(raw | {name: given[name] for name in TOKEN_IDS if name in given}),
        )
        if (folder / "generation_config.json").is_file():
            read_json(folder / "generation_config.json")
            try:
                model.generation_config = GenerationConfig.from_pretrained(folder)
            except Exception as error:  # for a field of the wrong type the library raises many kinds of errors
                file = folder / "generation_config.json"
                raise EaseError(f"{file} is damaged ({first_line(error)}): fetch it again") from error
        model.generation_config.update(**{name: given[name] for name in TOKEN_IDS if name in given})
        # Loading has refused every tensor that is missing or unknown, or has another shape.
        none: dict[str, Any] = {
            "missing_keys": set(),
            "unexpected_keys": set(),
            "mismatched_keys": set(),
            "error_msgs": [],
        }
        return cast(Self, (model, none)) if given.get("output_loading_info") else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Saves as transformers does, with the model's present shape and policy in the config."""
        for name, value in config_of(self.model).items():
            setattr(self.config, name, value)
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def policy(self) -> Policy:
        """Where tokens leave in evaluation mode."""
        return self.model.policy

    def set_routing(self, threshold: float | Sequence[float], exits: int | Sequence[int] | None = None) -> None:
        """Sets the exits and thresholds for everything that runs this model in evaluation mode.

        Args:
            threshold: confidence in [0, 1] at which a token leaves, for all exits or one per exit; 0 turns routing off.
            exits: layers after which tokens may leave; by default those set last, or else those that are trained.

        Raises:
            EaseError: the model has no such exit, or a threshold lies outside [0, 1].

        Example:
            >>> model.set_routing(0.9, exits=[4, 8])
            >>> model.set_routing(0)  # full depth
        """
        layers = (exits,) if isinstance(exits, int) else tuple(exits or self.config.exits or self.model.early_exits)
        if not layers:
            raise EaseError("no exit of this model is trained or set: name the exits, as in set_routing(0.9, [4, 8])")
        thresholds = [float(threshold)] * len(layers) if isinstance(threshold, int | float) else list(threshold)
        policy = Policy.of(layers, thresholds, **self.model.policy.options)
        policy.check(self.model.num_layers)
        self.model.policy = policy
        self.config.exits = list(layers)
        self.config.thresholds = thresholds

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise EaseError("the vocabulary of this model is fixed: resize the checkpoint with stock transformers first")

    def get_output_embeddings(self) -> nn.Module:
        return self.model.output_head

    set_output_embeddings = set_input_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: EaseCache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> EaseOutput | tuple[Any, ...]:
        """ids (B, T) -> logits (B, T, V), or (B, K, V) of the tokens that `logits_to_keep` selects.

        Args:
            input_ids: (B, T) ids.
            attention_mask: (B, T), 1 for real tokens, 0 for padding on either side. With a cache it also covers the
                columns read before, and the ids are its last T columns.
            position_ids: (B, T); each 0 begins a document, and documents do not attend to each other.
            past_key_values: the cache of the tokens before `input_ids`; the call then computes no gradients.
            labels: (B, T), the ids themselves; -100 is not scored.
            logits_to_keep: number of last columns, 0 for all, or a tensor of column indices, (K,) or (B, K).
            use_cache: in evaluation mode, creates a cache if none is passed, and returns it as `past_key_values`.
            return_dict: False returns a tuple.
            kwargs: arguments of the loss, such as `num_items_in_batch`.

        Raises:
            EaseError: an argument is missing, not supported, or does not fit the ids or the cache.
        """
        unsupported = ("inputs_embeds", "output_attentions", "output_hidden_states")
        if refused := [name for name in unsupported if kwargs.pop(name, None)]:
            raise EaseError(f"{', '.join(refused)} is not supported by this model: leave it out")
        if input_ids is None:
            raise EaseError("input_ids must be given, since this model reads token ids only")
        B, T = input_ids.shape
        cache = self._new_cache(B, T) if use_cache and past_key_values is None else past_key_values
        if cache is None:
            layout = make_layout(input_ids, attention_mask, position_ids)
        elif self.training or not isinstance(cache, EaseCache):
            raise EaseError(
                f"past_key_values must be an EaseCache that this model created, in evaluation mode, got "
                f"{type(cache).__name__}: leave it out, or call eval() first"
            )
        else:
            layout = cache.admit(input_ids, attention_mask, position_ids)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        kept = torch.arange(T, device=input_ids.device)[keep].expand(B, -1)
        routed = bool(self.policy.exits) and not self.training
        exits = None
        if routed or cache is not None:
            logits, exits = self._routed_logits(input_ids, layout, kept, cache)
        else:
            rows = torch.arange(B, device=input_ids.device)[:, None]
            logits = self.model.logits(self._full_depth(input_ids, layout)[rows, kept], self.model.num_layers)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        output = EaseOutput(loss=loss, logits=logits, past_key_values=cache, exits=exits if routed else None)
        return output.to_tuple() if return_dict is False else output

    def _full_depth(self, ids: Tensor, layout: Layout | None) -> Tensor:
        """ids (B, T) -> state (B, T, D) after the last layer, with gradient checkpointing where it is on."""
        state: Tensor = self.model.embed(ids)
        if not (self.gradient_checkpointing and self.training):
            return self.model.run(state, 1, self.model.num_layers, layout=layout)
        for layer in range(1, self.model.num_layers + 1):
            run_layer = partial(self.model.run, first=layer, last=layer, layout=layout)
            state = self._gradient_checkpointing_func(run_layer, state)
        return state

    @torch.no_grad()
    def _routed_logits(
        self, ids: Tensor, layout: Layout | None, kept: Tensor, cache: EaseCache | None
    ) -> tuple[Tensor, Tensor]:
        """Logits of the kept columns (B, K), each from the exit that the token took, and the exits (B, T)."""
        B, T = ids.shape
        V, K = self.model.output_head.weight.shape[0], kept.shape[1]
        logits = self.model.output_head.weight.new_zeros(B * K, V)
        row_of = torch.full((B, T), -1, device=ids.device)  # token -> its row of `logits`, -1 if it is not kept
        row_of.scatter_(1, kept, torch.arange(B * K, device=ids.device).view(B, K))

        def read(chunk: Tensor, places: Tensor) -> Tensor:
            rows = row_of.flatten()[places]
            logits[rows[rows >= 0]] = chunk[rows >= 0].to(logits.dtype)
            return chunk[:, :0]

        real = torch.ones_like(ids, dtype=torch.bool) if layout is None else layout.real
        exits = real * self.model.num_layers
        native = None if cache is None else cache.native
        for step in routed_forward(
            self.model, ids, self.policy, layout=layout, read=read, required=row_of >= 0, cache=native
        ):
            exits[step.left] = step.layer
        if cache is not None:
            cache.real = torch.cat([cache.real, real], 1)
        return logits.view(B, K, V), exits


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


AutoModelForCausalLM.register(EaseConfig, EaseForCausalLM, exist_ok=True)
