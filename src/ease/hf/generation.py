"""`generate` of transformers over the model's own cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from ease.errors import EaseError
from ease.hf.cache import EaseCache
from ease.hf.forward import expects_rows
from ease.models import StandardTransformer


class EaseGenerationMixin(GenerationMixin):
    """`generate` for a model that creates its own caches."""

    model: StandardTransformer
    training: bool
    _new_cache: Callable[[int, int], EaseCache]  # (rows, capacity), of the class that has the model

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Adds a cache with room for the longest possible text to `model_kwargs`, unless one is there or is off."""
        # A forward pre-hook may expect rows (B, T, D), as that of PEFT's `adapter_names`; with a cache, layers get
        # single tokens.
        if self.training or expects_rows(self.model):
            generation_config.use_cache = False
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            arguments = (generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
            super()._prepare_cache_for_generation(*arguments)  # type: ignore[misc]
            return
        if generation_config.cache_implementation is not None:
            raise EaseError(
                "cache_implementation is for stock models: leave it out, since this model has its own cache"
            )
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        model_kwargs["past_key_values"] = self._new_cache(rows, max_cache_length)

    def _prepare_position_ids_for_generation(self, *_: Any) -> None:
        """Does nothing: positions follow from mask or cache. transformers' are wrong after padding on the right."""

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Any, *, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Prepares as transformers does, and refuses a part of a prompt in which a row has only padding."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        embeds = inputs.get("inputs_embeds")
        if inputs_embeds is not None and embeds is None and inputs.get("past_key_values") is None:
            raise EaseError("generating from inputs_embeds needs a cache: call eval() and leave out use_cache=False")
        mask, T = inputs.get("attention_mask"), (inputs["input_ids"] if embeds is None else embeds).shape[1]
        if mask is not None and not bool(mask[:, -1].all()):
            real = mask[:, -T:].bool()
            if bool((mask.any(1) & ~real.any(1)).any()):
                raise EaseError(
                    "a row has only padding in this part of the prompt: pad prompts that are read in parts on the left"
                )
        return inputs

    def generate(  # type: ignore[override]
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """Generates as transformers does. Tokens are read once, except with `use_cache=False` and in training mode."""
        if any(
            getattr(source, "assistant_early_exit", None) is not None
            for source in (generation_config, self.generation_config)
        ) or kwargs.get("assistant_early_exit"):
            raise EaseError(
                "assistant_early_exit is for stock models (ease.save_pretrained writes one): use "
                "model.set_routing(threshold, exits)"
            )
        return super().generate(inputs, generation_config, **kwargs)  # type: ignore[misc]
