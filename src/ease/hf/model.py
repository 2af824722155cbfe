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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ease.errors import EaseError, checked, first_line, require
from ease.hf.checkpoint import from_pretrained, read_configuration
from ease.hf.folder import CONFIG, FIX, NATIVE, read_json
from ease.hf.options import read_options
from ease.hf.peft import STOCK_ADAPTERS, check_adapter
from ease.hf.prompting import TOKEN_IDS, token_ids
from ease.hf.weights import DTYPES, check_names
from ease.inputs import IGNORE, as_ids
from ease.interface import Layout
from ease.model_config import ModelConfig
from ease.models import DeepSupervisionTransformer, StandardTransformer
from ease.policy import Policy, exits_named, thresholds_named
from ease.storage import check_finite

try:
    from transformers import AutoModelForCausalLM, Cache, GenerationConfig, PreTrainedModel, initialization
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from ease.hf.backbone import Backbone
    from ease.hf.cache import EaseCache, Prefix, prefix_of
    from ease.hf.configuration import EaseConfig, config_of
    from ease.hf.forward import (
        LayerRun,
        Pass,
        after_prefix,
        as_asked,
        columns_to_keep,
        expects_rows,
        full_pass,
        loss_options,
        make_layout,
        read_tokens,
        routed_pass,
    )
    from ease.hf.generation import EaseGenerationMixin
except ImportError:
    require("transformers", "hf")
    raise


@dataclass
class EaseOutput(CausalLMOutputWithPast):
    """The output of transformers' causal models, with the exits of a routed pass.

    Args:
        exits: (B, T), the layer at which each token left; for padding 0, or -1 in a model with exit 0; None at full
            depth. With a cache, T counts the tokens of this call, as in `logits`.
    """

    exits: Tensor | None = None


class EasePreTrainedModel(PreTrainedModel):
    """What the classes for different tasks share: a native model behind the interface of transformers."""

    config_class = EaseConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _checkpoint_conversion_mapping = STOCK_ADAPTERS
    _tied_weights_keys = {"model.output_head.weight": "model.embedding.weight"}  # noqa: RUF012

    model: StandardTransformer
    classifies = False

    def __init__(self, config: EaseConfig, model: StandardTransformer | None = None) -> None:
        super().__init__(config)
        self.model = config.build() if model is None else model
        self.check_task(self.model.config)
        self.layer_run = LayerRun()
        # The native model's constructor sets initial values, except where parameters have no memory yet.
        self.model._is_hf_initialized = not self.model.embedding.weight.is_meta
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: weights are tied and initialized as in the models of transformers."""
        return False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        check_adapter([name for name in state_dict if name.startswith(prefix)], prefix, self.state_dict())
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def check_task(cls, shape: ModelConfig) -> None:
        """Raises EaseError for a model that predicts tokens where this class classifies sequences, or the reverse."""
        if cls.classifies and shape.num_labels is None:
            raise EaseError("this model predicts tokens: use EaseForCausalLM, or train a model with num_labels")
        if not cls.classifies and shape.num_labels is not None:
            raise EaseError("this model classifies sequences: use EaseForSequenceClassification")

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Gives parameters that were neither made nor loaded the initial values of a new native model."""
        parameters = dict(self.model.named_parameters())
        if not self.model._is_hf_initialized and not all(
            getattr(parameter, "_is_hf_initialized", False) for parameter in parameters.values()
        ):
            for name, value in DeepSupervisionTransformer(**asdict(self.model.config)).named_parameters():
                initialization.copy_(parameters[name], value)
        self.model._is_hf_initialized = True

    @classmethod
    @checked
    def wrap(cls, model: StandardTransformer, **options: Any) -> Self:
        """Wraps a native model, which is shared and not copied.

        Args:
            model: the native model.
            options: bos_token_id, eos_token_id and pad_token_id, and further fields of the configuration, such as
                name_or_path: the checkpoint of the model, which adapters store as that of their base.
        """
        if unknown := [name for name in options if not hasattr(EaseConfig(), name)]:
            raise EaseError(f"{', '.join(unknown)} is not a field of the configuration: leave it out")
        wrapped = cls(EaseConfig(**config_of(model), dtype=next(model.parameters()).dtype, **options), model)
        wrapped.train(model.training)
        return wrapped

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> Self:
        """Loads a folder that this class saved, or any checkpoint that `ease.from_pretrained` reads.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the Hugging Face hub.
            kwargs: the options of `ease.from_pretrained`; `bos_token_id`, `eos_token_id` and `pad_token_id`, which
                replace those of the checkpoint; `output_loading_info`, which also returns what a folder of this class
                lacks, instead of refusing it; and for a folder of this class `config`.

        Raises:
            EaseError: the checkpoint is missing, damaged or not supported, or an argument is not.
        """
        if pretrained_model_name_or_path is None:  # transformers then makes a model of `config` and `state_dict`
            return super().from_pretrained(None, *model_args, **kwargs)
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
            # This refuses sizes that do not fit the weights, before transformers makes a model.
            cls.check_task(read_configuration(folder)[0])
            given["output_loading_info"], reports = True, given.get("output_loading_info")
            loaded: Any = super().from_pretrained(folder, dtype=dtype or "auto", **given)
            model: Self = loaded[0]
            if not reports:
                check_names(loaded[1]["missing_keys"], loaded[1]["unexpected_keys"], folder)
            if model.config.tie_word_embeddings and model.model.output_head.weight is not model.model.embedding.weight:
                raise EaseError(f"{folder} has a head that is not its embedding: leave out tie_word_embeddings")
            model._record_source(pretrained_model_name_or_path)
            for name, parameter in model.named_parameters():
                if parameter.dtype in DTYPES.values() and not parameter.is_meta:
                    check_finite(name, parameter, folder, FIX)
            model.to(device)  # type: ignore[arg-type]
            return cast(Self, loaded) if reports else model
        if refused := sorted(given.keys() & {"config", "adapter_kwargs"}):
            raise EaseError(f"{', '.join(refused)} is not supported for this checkpoint: leave it out")
        model = cls.wrap(
            from_pretrained(folder, dtype=dtype, device=device),
            **token_ids(raw | {name: given[name] for name in TOKEN_IDS if name in given}),
        )
        model._record_source(pretrained_model_name_or_path)
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

    def _record_source(self, name: str | os.PathLike[str]) -> None:
        """Records the name of the checkpoint, which adapters store as that of their base."""
        self.name_or_path = self.config.name_or_path = os.fspath(name)

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
        layers = () if exits is None else exits_named(exits)
        layers = layers or tuple(self.config.exits or self.model.early_exits)
        if not layers:
            raise EaseError("no exit of this model is trained or set: name the exits, as in set_routing(0.9, [4, 8])")
        thresholds = list(thresholds_named(threshold))
        if isinstance(threshold, Real):
            thresholds *= len(layers)
        policy = Policy.of(layers, thresholds, **self.model.policy.options)
        self.model.check_policy(policy)
        self.model.policy = policy
        self.config.exits = list(layers)
        self.config.thresholds = thresholds

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        """Replaces the embedding; its number of rows becomes the size of the vocabulary."""
        self.model.embedding = value
        self.model.config = replace(self.model.config, vocab_size=value.num_embeddings)
        self.config.vocab_size = value.num_embeddings

    @property
    def base_model(self) -> nn.Module:
        """The model without its head, as trainers call it that compute the logits themselves."""
        return Backbone(self)

    def _new_cache(self, rows: int, capacity: int) -> EaseCache:
        """An empty cache with room for `capacity` tokens in each of `rows` rows, under the model's present policy."""
        return EaseCache(self.model.new_cache(rows, capacity, key=self.policy))

    def _choose_cache(self, cache: Cache | None, use_cache: bool | None, given: Tensor | None) -> Cache | Prefix | None:
        """The cache of a call whose ids or embeddings are `given`; None for a call without one."""
        stock = cache if isinstance(cache, Cache) and not isinstance(cache, EaseCache) else None
        if stock is not None and given is not None and stock.get_seq_length():
            prefix = prefix_of(stock, len(given), self.model.config)
            if self.training or (torch.is_grad_enabled() and not self.policy.exits):
                return prefix
            capacity = len(prefix) + given.shape[1]
            return EaseCache.after(prefix, self.model.new_cache(len(given), capacity, key=self.policy))
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled()
        # In training mode dropout gives a token other keys in every pass.
        if cache is not None or given is None or not use_cache or self.training or expects_rows(self.model):
            return cache
        return self._new_cache(len(given), given.shape[1])

    def _run(
        self,
        kept: Callable[[Tensor, Layout | None], Tensor],
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        output_hidden_states: bool | None,
        output_attentions: bool | None,
    ) -> tuple[Pass, Cache | None]:
        """Runs the tokens of a call, and returns what it gives and the cache that holds them.

        Args:
            kept: ids (B, T) and their layout -> (B, K) columns whose logits are computed, on the host.
            output_attentions: refused if true.

        The other arguments are those of `EaseForCausalLM.forward`.

        Raises:
            EaseError: an argument is missing, not supported, or does not fit the others or the cache.
        """
        input_ids, inputs_embeds, attention_mask, position_ids = read_tokens(
            input_ids, inputs_embeds, attention_mask, position_ids, self.model.config.dim
        )
        given = input_ids if inputs_embeds is None else inputs_embeds
        cache = self._choose_cache(past_key_values, use_cache, given)
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise EaseError(
                "output_attentions is not supported, since no layer stores its attention weights: leave it out"
            )
        if self.model.num_layers != len(self.model.exit_norms):
            raise EaseError(
                "layers were added to this model without exits, as PEFT's layer_replication does: leave it out, or "
                "call model.model.grow(num_layers) first"
            )
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        if (given is None) or (input_ids is not None and inputs_embeds is not None):
            raise EaseError("give either input_ids (B, T) or inputs_embeds (B, T, D)")
        ids = torch.zeros(given.shape[:2], dtype=torch.long, device=given.device) if input_ids is None else input_ids
        prefix = cache if isinstance(cache, Prefix) else None
        cache = None if isinstance(cache, Prefix) else cache
        if cache is None:
            places = 0 if prefix is None else len(prefix)
            layout = make_layout(ids, *after_prefix(places, attention_mask, position_ids))
        elif self.training or not isinstance(cache, EaseCache):
            raise EaseError(
                f"past_key_values must be an EaseCache that this model created, in evaluation mode, got "
                f"{type(cache).__name__}: leave it out, or call eval() first"
            )
        else:
            layout = cache.admit(ids, attention_mask, position_ids)
        columns, model = kept(ids, layout), self.model
        native = None if cache is None else cache.native
        if inputs_embeds is None:
            state = model.embed(ids, layout=layout, cache=native)
        else:
            state = model.embedded(inputs_embeds, layout=layout, cache=native)
        if prefix is not None or (cache is None and (self.training or not self.policy.exits)):
            return full_pass(model, self.layer_run, state, layout, columns, output_hidden_states, prefix), None
        return routed_pass(model, ids, state, layout, columns, output_hidden_states, cache), cache


class EaseForCausalLM(EasePreTrainedModel, EaseGenerationMixin):
    """A native language model behind the interface of transformers.

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

    def get_output_embeddings(self) -> nn.Module:
        return self.model.output_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replaces the head of all exits."""
        self.model.output_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> EaseOutput | tuple[Any, ...]:
        """ids (B, T) -> logits (B, T, V), or (B, K, V) of the tokens that `logits_to_keep` selects.

        Args:
            input_ids: (B, T) ids.
            attention_mask: (B, T), 1 for real tokens, 0 for padding on either side. With a cache it also covers the
                columns read before, and the ids are its last T columns.
            position_ids: (B, T); each 0 begins a document, and documents do not attend to each other.
            past_key_values: the cache of the tokens before `input_ids`; the call then computes no gradients. A cache of
                stock transformers gives keys and values that all tokens attend to, as the prefix of prefix tuning does;
                gradients reach them at full depth.
            inputs_embeds: (B, T, D) embeddings instead of `input_ids`.
            labels: (B, T), the ids themselves; -100 is not scored.
            logits_to_keep: number of last columns, 0 for all, or a tensor of column indices, (K,) or (B, K). In
                evaluation mode a column of padding stands for the last token before it.
            use_cache: in evaluation mode, creates a cache if none is passed, and returns it as `past_key_values`. By
                default `config.use_cache` decides where gradients are off, and there is no cache where they are on.
            output_hidden_states: returns the states (B, T, D) before layer 1 and after each layer, the last one
                normalized for the head; `config.output_hidden_states` by default. A token that left keeps its state.
            output_attentions: not supported.
            return_dict: False returns a tuple; `config.return_dict` by default.
            kwargs: arguments of the loss: `num_items_in_batch`, `ignore_index` and `shift_labels`.

        Raises:
            EaseError: an argument is missing, not supported, or does not fit the ids or the cache.
        """
        options = loss_options(kwargs)

        def kept(ids: Tensor, layout: Layout | None) -> Tensor:
            chosen = columns_to_keep(logits_to_keep, ids.shape[1]).expand(len(ids), -1)
            if layout is None or self.training:
                return chosen
            # Where a row is padded on the right, its last token predicts what comes next.
            return (layout.host.real * torch.arange(ids.shape[1])).cummax(1).values.gather(1, chosen)

        result, cache = self._run(
            kept,
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            output_attentions,
        )
        loss = None
        if labels is not None:
            V, labels = result.logits.shape[-1], as_ids("labels", labels)
            if labels.shape != result.logits.shape[:2] and options.get("shift_labels") is None:
                raise EaseError(
                    f"labels must have the shape {tuple(result.logits.shape[:2])} of the tokens with logits, got "
                    f"{tuple(labels.shape)}"
                )
            if labels.device.type == "cpu":  # on a device the check would wait for it
                self.model.check_ids(labels[labels != options.get("ignore_index", IGNORE)], V)
            loss = self.loss_function(logits=result.logits, labels=labels, vocab_size=V, **options)
        output = EaseOutput(
            loss=loss,
            logits=result.logits,
            past_key_values=cache,
            hidden_states=result.hidden_states,
            exits=result.exits,
        )
        return as_asked(output, return_dict, self.config)


# transformers decides by these names how labels are shifted (label smoothing) and what a pipeline accepts.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[NATIVE] = EaseForCausalLM.__name__

AutoModelForCausalLM.register(EaseConfig, EaseForCausalLM, exist_ok=True)
