"""What PEFT looks up by model type: the modules that a method adapts where its configuration names none.

PEFT has no way to register them, and importing it takes seconds. Its tables are therefore filled when it asks for a
configuration, which it does before it looks anything up.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from ease.errors import EaseError
from ease.hf.folder import NATIVE

# Stock Llama's module -> the native one. The names contain the parent module, so that PEFT refuses to load an adapter
# with these targets into a stock model instead of leaving out its weights.
NATIVE_MODULES = {
    **{name: f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{name: f"ffn.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}

# Pattern in the name of an adapter's weight for a stock model -> the native name. PEFT reads it from the model class.
STOCK_ADAPTERS = {
    r"\bself_attn\b": "attention",
    r"\bmlp\b": "ffn",
    r"\bembed_tokens\b": "embedding",
    r"^lm_head\b": "model.output_head",
}


ADAPTED = "base_model.model."  # where PEFT keeps the model that it adapts


def check_adapter(stored: Iterable[str], prefix: str, known: Iterable[str]) -> None:
    """Raises EaseError for weights of an adapter that the model has no module for, which PEFT leaves out in silence.

    Args:
        stored: names of weights that are loaded.
        prefix: what stands before the names of the model's own weights.
        known: those names.
    """
    if prefix == ADAPTED and (unknown := sorted({*stored} - {prefix + name for name in known})):
        raise EaseError(
            f"the adapter's {unknown[0].removeprefix(prefix)} has no counterpart in this model: name its target "
            "modules in adapter_config.json as here (embedding, output_head, attention.q_proj, ffn.up_proj)"
        )


def register_targets() -> None:
    """Gives every method of PEFT that has default modules for Llama the same ones here, where PEFT is imported."""
    constants = sys.modules.get("peft.utils.constants")
    for name, table in vars(constants).items() if constants is not None else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in table:
            modules = [NATIVE_MODULES[module] for module in table["llama"] if module in NATIVE_MODULES]
            table.setdefault(NATIVE, modules)
