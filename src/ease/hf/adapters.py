"""PEFT adapters merged into a native model, whether they were trained on it or on its stock form."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ease.errors import EaseError, require
from ease.hf.config import write_config
from ease.hf.model import EaseForCausalLM
from ease.hf.weights import STOCK_NAMES, joined, split_parameters
from ease.models import StandardTransformer


def merge_adapter(
    model: EaseForCausalLM, adapter: str, *, revision: str | None = None, vocab_size: int | None = None
) -> EaseForCausalLM:
    """Merges a PEFT adapter into the weights of a model, which is used up.

    An adapter of the stock model changes the layers, the embedding and the head; exits below the last layer keep their
    norms.

    Args:
        model: the model that the adapter was trained on, or the native form of the stock model that it was.
        adapter: a folder, or a name on the Hugging Face hub.
        revision: branch, tag or commit of a name on the hub.
        vocab_size: size that the vocabulary is given first, for an adapter that was trained with other tokens.

    Returns:
        The model with the adapter, with exits and policy as before.

    Raises:
        EaseError: there is no such adapter, it cannot be merged, or it does not fit the model.
    """
    peft = require("peft", "eval")
    options = {} if revision is None else {"revision": revision}
    try:
        config = peft.PeftConfig.from_pretrained(adapter, **options)
        stored = peft.load_peft_weights(adapter, device="cpu", **options)
    except Exception as error:  # of several libraries, and several kinds
        raise EaseError(
            f"the adapter {adapter} cannot be read ({_last_line(error)}): pass the folder of a PEFT adapter, or its "
            "name on the Hugging Face hub"
        ) from error
    if config.is_prompt_learning:
        raise EaseError(
            f"the adapter {adapter} is of type {config.peft_type.value}, which has no weights to merge: use one that "
            "changes weights, such as LoRA"
        )
    native = any(part in name for name in stored for part in STOCK_NAMES if part != "layers.")
    if vocab_size is not None:
        model.resize_token_embeddings(vocab_size)
    host: Any = model if native else _stock_form(model.model)
    try:
        adapted = peft.PeftModel(host, config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is missing or left over is an error below
            loaded = adapted.load_adapter(adapter, "default", **options)
        if unused := [*loaded.missing_keys, *loaded.unexpected_keys]:
            raise EaseError(f"{unused[0]} has no counterpart")
        merged = adapted.merge_and_unload()
    except Exception as error:
        raise EaseError(
            f"the adapter {adapter} does not fit the model ({_last_line(error)}): use the model that it was trained on"
        ) from error
    if not native:
        weights = merged.state_dict()
        with torch.no_grad():
            for name, parts in split_parameters(model.model, merged.config.model_type)[0].items():
                for part, rows in zip(parts, weights[name].split(list(map(len, parts))), strict=True):
                    part.copy_(rows)
    return model


def _stock_form(model: StandardTransformer) -> Any:
    """The stock model that shares the weights of a native one. Its buffers hold no values, so that it cannot run."""
    from transformers import AutoConfig, AutoModelForCausalLM

    written = write_config(model.config, {}, next(model.parameters()).dtype)
    stock, _ = split_parameters(model, written["model_type"])
    with torch.device("meta"):
        host = AutoModelForCausalLM.from_config(AutoConfig.for_model(**written))
    host.load_state_dict({name: joined(parts) for name, parts in stock.items()}, assign=True, strict=False)
    host.tie_weights()
    return host


def _last_line(error: BaseException) -> str:
    """The last line of an error's message, in which libraries name the tensor."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
