"""The native model as a citizen of transformers: `generate`, `Trainer`, pipelines, saving and LoRA work on it.

- Importing this module registers `EaseForCausalLM` with the Auto classes, under the model type "ease".
- A folder that `save_pretrained` of this class writes holds the native names, so a `Trainer` resumes from it; for
  one that stock transformers loads, `ease.save_pretrained(model.model, folder)`.
- Depth and policy are the model's own. The config tells them, and changing the config changes neither.
- `generate` reads every token once, into a cache of the model's own (`hf_cache.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ease.errors import EaseError, require
from ease.hf.checkpoint import NATIVE, from_pretrained
from ease.hf.folder import CONFIG, checkpoint_folder, read_json
from ease.interface import Layout
from ease.models import DeepSupervisionTransformer
from ease.policy import Policy
from ease.routing.forward import routed_forward

try:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from ease.hf.cache import EaseCache
except ImportError:
    require("transformers", "hf")
    raise


class EaseConfig(PreTrainedConfig):
    """What config.json of an `EaseForCausalLM` says.

    Args:
        model: the fields of `ease.ModelConfig`.
        exits: layers after which tokens may leave.
        thresholds: one per exit, 0 where it does not route.
        trained_exits: exits that a loss has trained.
        policy_options: further fields of `ease.Policy`.
    """

    model_type = NATIVE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["exits"]

    model: dict[str, Any] | None = None
    exits: list[int] | tuple[int, ...] = ()
    thresholds: list[float] | tuple[float, ...] = ()
    trained_exits: list[int] | tuple[int, ...] = ()
    policy_options: dict[str, Any] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    # Read by tools that know nothing of ease. Read-only: what builds the model is `model`.
    vocab_size = property(lambda self: (self.model or {}).get("vocab_size"))
    hidden_size = property(lambda self: (self.model or {}).get("dim"))
    num_hidden_layers = property(lambda self: (self.model or {}).get("num_layers"))
    num_attention_heads = property(lambda self: (self.model or {}).get("num_heads"))
    max_position_embeddings = property(lambda self: (self.model or {}).get("max_positions"))
    tie_word_embeddings = property(lambda self: bool((self.model or {}).get("tie_embeddings")))


@dataclass
class EaseOutput(CausalLMOutputWithPast):
    """As transformers' own, and of a routed pass also `exits` (B, T): where each token left, 0 for padding.

    With a cache T counts the tokens that came, as in `logits`, and not those read before.
    """

    exits: Tensor | None = None


class EaseForCausalLM(PreTrainedModel, GenerationMixin):
    """A native model (`.model`) in the clothes of transformers.

    In evaluation mode it is routed as `set_routing` says; in training mode it runs at full depth, and the loss is
    the final exit's.
    """

    config_class = EaseConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
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
        """The native model has its initial values from its own constructor."""

    @classmethod
    def wrap(cls, model: DeepSupervisionTransformer, **token_ids: Any) -> Self:
        """A native model, shared and not copied; `token_ids` are bos_token_id, eos_token_id and pad_token_id."""
        wrapped = cls(EaseConfig(**_told(model), dtype=next(model.parameters()).dtype, **token_ids), model)
        wrapped.train(model.training)
        return wrapped

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *model_args: Any, **kwargs: Any
    ) -> Self:
        """Reads a folder of this class as transformers does, and any checkpoint that `ease.from_pretrained` reads.

        Of the latter the arguments are `dtype` (a torch dtype, its name or "auto") and `device`.
        """
        folder = checkpoint_folder(pretrained_model_name_or_path)
        raw = read_json(folder / CONFIG)
        if raw.get("model_type") == NATIVE:
            loaded: Self = super().from_pretrained(folder, *model_args, **kwargs)
            return loaded
        if unknown := sorted(kwargs.keys() - {"dtype", "torch_dtype", "device"}):
            raise EaseError(f"{', '.join(unknown)} is not to be had for this checkpoint: give dtype and device alone")
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        model = cls.wrap(
            from_pretrained(folder, dtype=dtype, device=kwargs.get("device")), **{name: raw.get(name) for name in names}
        )
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As transformers' own; the config tells the model as it is now, adapters and policy included."""
        for name, value in _told(self.model).items():
            setattr(self.config, name, value)
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def policy(self) -> Policy:
        """Where tokens leave in evaluation mode."""
        return self.model.policy

    def set_routing(self, threshold: float | Sequence[float], exits: int | Sequence[int] | None = None) -> None:
        """Turns early exit on for everything that runs this model in evaluation mode.

        Args:
            threshold: confidence in [0, 1] at which a token leaves, one for all exits or one each; 0 turns it off.
            exits: layers after which tokens may leave; those set before by default, then those that are trained.

        Raises:
            EaseError: for a policy that the model cannot follow.
        """
        chosen = (exits,) if isinstance(exits, int) else tuple(exits or self.config.exits or self.model.early_exits)
        if not chosen:
            raise EaseError("no exit of this model is trained or set: name the exits, as in set_routing(0.9, [4, 8])")
        thresholds = [float(threshold)] * len(chosen) if isinstance(threshold, int | float) else list(threshold)
        policy = Policy.of(chosen, thresholds, **self.model.policy.options)
        policy.check(self.model.num_layers)
        self.model.policy = policy
        self.config.exits, self.config.thresholds = list(chosen), thresholds

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
        """ids (B, T) -> logits (B, T, V), or those of the places in `logits_to_keep`.

        Args:
            attention_mask: (B, T), 1 for real tokens, 0 for padding on either side; with a cache, of what was read
                before and of the ids, which are its last T columns.
            position_ids: (B, T); each 0 begins a document, and none attends to another.
            past_key_values: what was read before; the ids are what comes next, and nothing is learned from them.
            labels: (B, T), the ids themselves; -100 is not scored.
            logits_to_keep: the last so many places, 0 for all, or a tensor of places, (K,) or (B, K) for each row.
            use_cache: in evaluation mode, makes a cache where none is passed; it comes back as `past_key_values`.
        """
        asked = ("inputs_embeds", "output_attentions", "output_hidden_states")
        if refused := [name for name in asked if kwargs.pop(name, None)]:
            raise EaseError(f"{', '.join(refused)} is not to be had of this model: leave it out")
        if input_ids is None:
            raise EaseError("input_ids are missing: this model reads token ids")
        B, T = input_ids.shape
        cache = self._new_cache(B, T) if use_cache and past_key_values is None else past_key_values
        if cache is None:
            layout = make_layout(input_ids, attention_mask, position_ids)
        elif self.training or not isinstance(cache, EaseCache):
            raise EaseError(
                f"past_key_values is a {type(cache).__name__}: leave it out, or pass one that this model made in "
                "evaluation mode, and in that mode"
            )
        else:
            layout = cache.come(input_ids, attention_mask, position_ids)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        kept = torch.arange(T, device=input_ids.device)[keep].expand(B, -1)
        routed = bool(self.policy.exits) and not self.training
        exits = None
        if routed or cache is not None:
            logits, exits = self._walk(input_ids, layout, kept, cache)
        else:
            rows = torch.arange(B, device=input_ids.device)[:, None]
            logits = self.model.logits(self._full_depth(input_ids, layout)[rows, kept], self.model.num_layers)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        output = EaseOutput(loss=loss, logits=logits, past_key_values=cache, exits=exits if routed else None)
        return output.to_tuple() if return_dict is False else output

    def _full_depth(self, ids: Tensor, layout: Layout | None) -> Tensor:
        state: Tensor = self.model.embed(ids)
        if not (self.gradient_checkpointing and self.training):
            return self.model.run(state, 1, self.model.num_layers, layout=layout)
        for layer in range(1, self.model.num_layers + 1):
            one = partial(self.model.run, first=layer, last=layer, layout=layout)
            state = self._gradient_checkpointing_func(one, state)
        return state

    @torch.no_grad()
    def _walk(self, ids: Tensor, layout: Layout | None, kept: Tensor, cache: EaseCache | None) -> tuple[Tensor, Tensor]:
        """Logits of the kept places (B, K), each of the exit that the token took, and the exits (B, T)."""
        (B, T), V, K = ids.shape, self.model.output_head.weight.shape[0], kept.shape[1]
        logits = self.model.output_head.weight.new_zeros(B * K, V)
        rows = torch.full((B, T), -1, device=ids.device)
        rows.scatter_(1, kept, torch.arange(B * K, device=ids.device).view(B, K))

        def read(chunk: Tensor, places: Tensor) -> Tensor:
            row = rows.flatten()[places]
            logits[row[row >= 0]] = chunk[row >= 0].to(logits.dtype)
            return chunk[:, :0]

        real = torch.ones_like(ids, dtype=torch.bool) if layout is None else layout.real
        exits = real * self.model.num_layers
        native = None if cache is None else cache.native
        for stop in routed_forward(
            self.model, ids, self.policy, layout=layout, read=read, required=rows >= 0, cache=native
        ):
            exits[stop.left] = stop.layer
        if cache is not None:
            cache.real = torch.cat([cache.real, real], 1)
        return logits.view(B, K, V), exits

    def _new_cache(self, rows: int, capacity: int) -> EaseCache | None:
        """Training mode has none: with dropout, a token would not be read twice in the same way."""
        return None if self.training else EaseCache(self.model.new_cache(rows, capacity, key=self.policy))

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Puts a cache with room for the longest text that may come into `model_kwargs`, unless told otherwise."""
        # A hook before a layer may count on rows, as that of PEFT's `adapter_names`, and a cache hands out tokens.
        if self.training or any(module._forward_pre_hooks for module in self.model.modules()):
            generation_config.use_cache = False
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            arguments = (generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
            super()._prepare_cache_for_generation(*arguments)  # type: ignore[misc]
            return
        if generation_config.cache_implementation is not None:
            raise EaseError("cache_implementation is for stock models: leave it out, this model has a cache of its own")
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        model_kwargs["past_key_values"] = self._new_cache(rows, max_cache_length)

    def _prepare_position_ids_for_generation(self, *_: Any) -> None:
        """Positions follow from the mask, or from the cache: transformers' own go wrong after padding on the right."""

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As transformers' own; a row that is padded on the right goes on from its last token."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]
        mask, T = inputs.get("attention_mask"), inputs["input_ids"].shape[1]
        if mask is not None and not bool(mask[:, -1].all()):
            real = mask[:, -T:].bool()
            if bool((mask.any(1) & ~real.any(1)).any()):
                raise EaseError("a row has no token in what comes next: pad prompts that are read in parts on the left")
            inputs["logits_to_keep"] = (real * torch.arange(T, device=real.device)).amax(1, keepdim=True)
        return inputs

    def generate(  # type: ignore[override]
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """transformers' own; each token is read once, unless `use_cache=False` or the model is in training mode."""
        if any(
            getattr(source, "assistant_early_exit", None) is not None
            for source in (generation_config, self.generation_config)
        ) or kwargs.get("assistant_early_exit"):
            raise EaseError(
                "assistant_early_exit is for stock models (ease.save_pretrained writes one): here, early exit is "
                "model.set_routing(threshold, exits)"
            )
        return super().generate(inputs, generation_config, **kwargs)  # type: ignore[misc]


def _told(model: DeepSupervisionTransformer) -> dict[str, Any]:
    """What a config tells of a model."""
    policy = model.policy
    return {
        "model": asdict(model.config),
        "exits": policy.exits,
        "thresholds": policy.thresholds,
        "policy_options": policy.options,
        "trained_exits": sorted(model.trained_exits),
    }


def make_layout(ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Layout | None:
    """Positions and segments from what transformers passes; None for plain rows, which run fastest."""
    if attention_mask is None and position_ids is None:
        return None
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    if mask.shape != ids.shape:
        raise EaseError(f"attention_mask has shape {tuple(mask.shape)}: give one of {tuple(ids.shape)}, as the ids")
    layout = Layout.from_attention_mask(mask)
    if position_ids is not None:
        if position_ids.shape not in (ids.shape, ids.shape[1:], (1, ids.shape[1])):
            raise EaseError(f"position_ids has shape {tuple(position_ids.shape)}: give one of {tuple(ids.shape)}")
        positions = position_ids.expand_as(ids)
        documents = (layout.real & (positions == 0)).cumsum(1)
        layout = Layout(positions, torch.where(layout.real, documents, -1))
    plain = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return None if bool(layout.real.all()) and torch.equal(layout.positions, plain) else layout


AutoConfig.register(NATIVE, EaseConfig, exist_ok=True)

AutoModelForCausalLM.register(EaseConfig, EaseForCausalLM, exist_ok=True)
