"""The config.json of a native model as a transformers configuration."""

from __future__ import annotations

from dataclasses import MISSING, asdict, field, fields
from typing import Any, ClassVar

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from ease.errors import EaseError, first_line
from ease.hf.folder import NATIVE
from ease.hf.peft import register_targets
from ease.model_config import ModelConfig
from ease.models import DeepSupervisionTransformer, StandardTransformer
from ease.policy import Policy


def _model_field(name: str) -> Any:
    """A property that reads and sets the field `name` of `EaseConfig.model`."""

    def set_field(config: EaseConfig, value: Any) -> None:
        config.model = {**(config.model or {}), name: value}  # a new dict: the caller's stays as it is

    default = next((f.default for f in fields(ModelConfig) if f.name == name), None)
    return property(lambda config: (config.model or {}).get(name, None if default is MISSING else default), set_field)


class EaseConfig(PreTrainedConfig):
    """The config.json of an `EaseForCausalLM`.

    Args:
        model: the fields of `ease.ModelConfig`.
        exits: layers after which tokens may leave.
        thresholds: one per exit; an exit with threshold 0 is not used.
        trained_exits: exits that a loss has trained.
        stale_classifiers: exits whose classifier was trained before what lies below it.
        policy_options: the other fields of `ease.Policy`.
        bos_token_id, eos_token_id, pad_token_id: as in transformers.
        use_cache: whether `forward` returns a cache by default, in evaluation mode and without gradients.
    """

    model_type = NATIVE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["exits", "past_key_values"]

    model: dict[str, Any] | None = None
    exits: list[int] | tuple[int, ...] = ()
    thresholds: list[float] | tuple[float, ...] = ()
    trained_exits: list[int] | tuple[int, ...] = ()
    stale_classifiers: list[int] | tuple[int, ...] = ()
    policy_options: dict[str, Any] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    use_cache: bool = True
    auto_map: dict[str, str] = field(default_factory=dict)  # tools look for code of the checkpoint here

    # Stock names, for tools that read or set them. The values are those of `model`, from which a model is built.
    vocab_size = _model_field("vocab_size")
    hidden_size = _model_field("dim")
    num_hidden_layers = _model_field("num_layers")
    num_attention_heads = _model_field("num_heads")
    num_key_value_heads = _model_field("num_kv_heads")
    intermediate_size = _model_field("hidden_dim")
    max_position_embeddings = _model_field("max_positions")
    tie_word_embeddings = _model_field("tie_embeddings")

    def to_dict(self) -> dict[str, Any]:
        """All fields, with the sizes of the model under their stock names, where PEFT reads them."""
        register_targets()
        fields: dict[str, Any] = super().to_dict()
        try:
            return fields | stock_sizes(ModelConfig(**(self.model or {})))
        except (EaseError, TypeError):  # the fields describe no model; `build` raises the error
            return fields

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields of config.json, which has the sizes in `model` only."""
        hidden = {*STOCK_SIZES} if self.auto_map else {*STOCK_SIZES, "auto_map"}
        fields: dict[str, Any] = super().to_diff_dict()
        return {name: value for name, value in fields.items() if name not in hidden}

    def build(self, **fields: Any) -> DeepSupervisionTransformer:
        """A new native model of this shape and policy.

        Args:
            fields: fields of `ModelConfig` that replace those of `model`.

        Raises:
            EaseError: the fields describe no model.
        """
        try:
            model = DeepSupervisionTransformer(**{**(self.model or {}), **fields})
        except TypeError as error:  # a field that is missing or unknown
            raise EaseError(
                f"the configuration describes no model ({first_line(error)}): set vocab_size and the other fields of "
                "ease.ModelConfig in `model`"
            ) from error
        model.policy = Policy.of(self.exits, self.thresholds, **(self.policy_options or {}))
        model.check_policy(model.policy)
        model.trained_exits, model.stale_classifiers = set(self.trained_exits), set(self.stale_classifiers)
        return model


# Stock name of a size -> the attribute of `ModelConfig`.
STOCK_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "ffn_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_size",
    "max_position_embeddings": "max_positions",
}


def stock_sizes(model: ModelConfig) -> dict[str, Any]:
    """The sizes of a model under their stock names."""
    return {name: getattr(model, attribute) for name, attribute in STOCK_SIZES.items()}


def config_of(model: StandardTransformer) -> dict[str, Any]:
    """The fields of `EaseConfig` that describe a model."""
    policy = model.policy
    return {
        "model": asdict(model.config),
        "exits": policy.exits,
        "thresholds": policy.thresholds,
        "policy_options": policy.options,
        "trained_exits": sorted(model.trained_exits),
        "stale_classifiers": sorted(model.stale_classifiers),
        **({} if model.config.num_labels is None else {"num_labels": model.config.num_labels}),
    }


AutoConfig.register(NATIVE, EaseConfig, exist_ok=True)
