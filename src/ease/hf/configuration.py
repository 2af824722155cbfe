"""The config.json of a native model as a transformers configuration."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from ease.hf.folder import NATIVE
from ease.models import DeepSupervisionTransformer


class EaseConfig(PreTrainedConfig):
    """The config.json of an `EaseForCausalLM`.

    Args:
        model: the fields of `ease.ModelConfig`.
        exits: layers after which tokens may leave.
        thresholds: one per exit; an exit with threshold 0 is not used.
        trained_exits: exits that a loss has trained.
        policy_options: the other fields of `ease.Policy`.
        bos_token_id, eos_token_id, pad_token_id: as in transformers.
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

    # For tools that read stock names. Read-only, since the model is built from `model` alone.
    vocab_size = property(lambda self: (self.model or {}).get("vocab_size"))
    hidden_size = property(lambda self: (self.model or {}).get("dim"))
    num_hidden_layers = property(lambda self: (self.model or {}).get("num_layers"))
    num_attention_heads = property(lambda self: (self.model or {}).get("num_heads"))
    max_position_embeddings = property(lambda self: (self.model or {}).get("max_positions"))
    tie_word_embeddings = property(lambda self: bool((self.model or {}).get("tie_embeddings")))


def config_of(model: DeepSupervisionTransformer) -> dict[str, Any]:
    """The fields of `EaseConfig` that describe a model."""
    policy = model.policy
    return {
        "model": asdict(model.config),
        "exits": policy.exits,
        "thresholds": policy.thresholds,
        "policy_options": policy.options,
        "trained_exits": sorted(model.trained_exits),
    }


AutoConfig.register(NATIVE, EaseConfig, exist_ok=True)
