"""Analytic FLOP counts of a model's parts.

A product of (m, k) with (k, n) counts 2 m k n. The count includes projections, attention over the query-key pairs that
the causal mask admits, the feed-forward, and every head evaluation; as usual it excludes norms, rotary embeddings, and
softmax (Kaplan et al. 2020, arXiv:2001.08361, section 2.1). Training a layer costs three times its forward: one product
each for the gradients of input and weight.

All other counts build on these: a routed forward's on `ExitStep.flops`, a training step's on `training/step.py`.
"""

from __future__ import annotations

from torch import Tensor

from ease.interface import ExitModel, Layout
from ease.model_config import ModelConfig


def real_pairs(active: Tensor, layout: Layout | None = None) -> int:
    """Query-key pairs of the active tokens (B, T): each attends to itself and to the tokens before it."""
    if layout is None:
        return int((active * active.new_ones(active.shape[1]).cumsum(0)).sum())
    return int((layout.positions + 1)[active & layout.real].sum())


def layer_flops(config: ModelConfig, tokens: int, queries: int, pairs: int) -> int:
    """One layer's forward: keys and values of `tokens` tokens, `queries` queries, `pairs` query-key pairs."""
    D, Q, KV = config.dim, config.num_heads * config.head_size, config.kv_heads * config.head_size
    return 2 * (tokens * 2 * D * KV + queries * (2 * D * Q + 3 * D * config.ffn_size) + 2 * pairs * Q)


def run_flops(config: ModelConfig, layers: int, active: Tensor, layout: Layout | None = None) -> int:
    """The forward of `layers` layers over a batch with active tokens (B, T)."""
    return layers * layer_flops(config, active.numel(), int(active.sum()), real_pairs(active, layout))


def head_flops(config: ModelConfig, tokens: int) -> int:
    """The head, evaluated for `tokens` tokens."""
    return 2 * tokens * config.dim * config.outputs


def exit_flops(config: ModelConfig, tokens: int, exit: int) -> int:
    """Exit `exit`, evaluated for `tokens` tokens: its adapter, if it has one, and the head."""
    adapter = 4 * tokens * config.dim * config.adapter_dim if exit in config.adapter_exits else 0
    return head_flops(config, tokens) + adapter


def classifier_flops(config: ModelConfig, tokens: int) -> int:
    """An exit's classifier, evaluated for `tokens` tokens."""
    return 2 * tokens * config.dim


def draft_flops(config: ModelConfig, running: Tensor, length: int) -> int:
    """The draft brick at every place of running tokens (B, T), for the 1st to `length`-th drafts, without the head."""
    tokens, pairs, total = int(running.sum()), real_pairs(running), 0
    for k in range(1, length + 1):  # keys and values of the drafts before are computed again
        total += 4 * tokens * config.dim**2 + layer_flops(config, k * tokens, tokens, pairs)
    return total


def draft_head_flops(config: ModelConfig, tokens: int) -> int:
    """The head's rows for the draft vocabulary, evaluated for `tokens` tokens."""
    return 2 * tokens * config.dim * (config.draft_vocabulary or 0)


def parameters_read(model: ExitModel) -> dict[str, int]:
    """What a pass at full depth reads for one token: all parameters but the other rows of embedding and memory.

    Returns:
        "parameters": their number, and "bytes": their size.
    """
    c = model.config
    unread = c.memory_size - len(c.memory_orders) * c.dim + (0 if c.tie_embeddings else (c.vocab_size - 1) * c.dim)
    every = list(model.parameters())
    size = every[0].element_size()
    return {
        "parameters": sum(p.numel() for p in every) - unread,
        "bytes": sum(p.numel() * p.element_size() for p in every) - unread * size,
    }


def full_depth_flops(config: ModelConfig, seq_len: int) -> float:
    """Forward FLOPs per token of a pass without exits over sequences of `seq_len` tokens: all layers and one head."""
    pairs = seq_len * (seq_len + 1) // 2
    layers = config.num_layers * layer_flops(config, seq_len, seq_len, pairs)
    return (layers + head_flops(config, seq_len)) / seq_len
