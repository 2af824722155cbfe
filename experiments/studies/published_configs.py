"""Which published configurations load, and whether they compute what stock transformers computes.

Each configuration of published_configs.json is kept key by key and made tiny (heads, widths, layers, vocabulary, and
positions with windows in proportion), a stock model with random weights is saved under it, and ease loads the folder.
The logits of a text, those of a padded batch, and 12 greedy tokens are compared in float32.

python -m experiments.studies.published_configs [OUT]

OUT is the Markdown table to write (standard output by default). "source" in the data file is "copy" where the keys and
values were read from a public copy of config.json, and "recalled" where they were written from knowledge of it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import ease
from ease import EaseError
from ease.hf.config import read_config
from ease.hf.model import EaseForCausalLM

DATA = Path(__file__).with_suffix(".json")
HEAD_DIM, LAYERS, VOCABULARY, POSITIONS, T = 16, 6, 96, 64, 48
TOLERANCE = 1e-4  # of the largest difference of two logits, in standard deviations of the logits


def published() -> dict[str, dict[str, Any]]:
    """Name of a checkpoint -> its config.json."""
    return {name: entry["config"] for name, entry in json.loads(DATA.read_text(encoding="utf-8")).items()}


def tiny(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the same keys, at tiny sizes."""
    c = dict(config)
    heads, kv_heads = c["num_attention_heads"], c.get("num_key_value_heads", c["num_attention_heads"])
    width = c.get("head_dim") or c["hidden_size"] // heads
    group = min(heads // kv_heads, 8)
    c["num_key_value_heads"] = kv_heads = 1 if kv_heads == 1 or group > 4 else 2
    c["num_attention_heads"] = group * kv_heads
    wider = c["hidden_size"] / (heads * width)
    c["hidden_size"] = round(group * kv_heads * wider) * HEAD_DIM
    c |= {"intermediate_size": 40, "vocab_size": VOCABULARY}
    if "head_dim" in c:
        c["head_dim"] = HEAD_DIM
    if "num_key_value_heads" not in config:
        del c["num_key_value_heads"]
        c["num_attention_heads"] = 4
        c["hidden_size"] = 4 * HEAD_DIM
    for key in ("num_hidden_layers", "num_layers"):
        if key in c:
            c[key] = LAYERS
    if "max_window_layers" in c:
        c["max_window_layers"] = round(c["max_window_layers"] * LAYERS / config["num_hidden_layers"])
    for key in ("layer_types", "no_rope_layers"):
        if c.get(key):
            c[key] = c[key][:LAYERS]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = c.get(key)
        if ids is not None:
            c[key] = [i % VOCABULARY for i in ids] if isinstance(ids, list) else ids % VOCABULARY

    rope = dict(c.get("rope_scaling") or {})
    length = "original_max_position_embeddings"
    original = rope.get(length) or c.get(length) or c["max_position_embeddings"]
    shrink = POSITIONS / original

    def shorter(tokens: int) -> int:
        return max(3, round(tokens * shrink))

    for key in ("max_position_embeddings", length, "sliding_window", "sliding_window_size", "max_sequence_length"):
        if c.get(key):
            c[key] = shorter(c[key])
    if rope:
        if length in rope:
            rope[length] = shorter(rope[length])
        rotated = int(HEAD_DIM * c.get("partial_rotary_factor", 1))
        for key in ("long_factor", "short_factor"):
            if key in rope:
                rope[key] = rope[key][:: 2 * len(rope[key]) // rotated]
        c["rope_scaling"] = rope
    return c


def stock_model(folder: Path) -> Any:
    """A stock model of config.json in `folder`, with weights far from their initial values, saved there."""
    text = (folder / "config.json").read_bytes()
    torch.manual_seed(0)
    # Sdpa kernels differ from eager attention by rounding, and have no soft caps.
    config = AutoConfig.from_pretrained(folder, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.06 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "config.json").write_bytes(text)  # and not what this version of transformers makes of it
    return model


def greedy(model: Any, ids: Tensor, count: int) -> Tensor:
    """Without a cache: in stock transformers a windowed cache may give other tokens than the whole text."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[:, -count:]


@torch.no_grad()
def compare(config: Mapping[str, Any], folder: Path) -> tuple[str, float | None]:
    """How a published configuration loads.

    Returns:
        "equal", "different", or the sentence with which it is refused, and the largest difference of a logit in
        standard deviations of the logits (None if it is refused).
    """
    raw = tiny(config)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    try:
        read_config(raw)
    except EaseError as error:
        return str(error), None
    stock = stock_model(folder)
    try:
        model = ease.from_pretrained(folder)
    except EaseError as error:
        return str(error).replace(str(folder), "the checkpoint"), None
    ids = torch.randint(0, VOCABULARY, (3, T))
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    expected = stock(ids).logits
    padded = stock(ids, attention_mask=mask, position_ids=places).logits
    found = EaseForCausalLM.wrap(model)(ids, attention_mask=mask).logits
    difference = max(
        float((model(ids) - expected).abs().max()), float((found - padded)[mask.bool()].abs().max())
    ) / float(expected.std())
    same = torch.equal(ease.generate(model, ids[:, :-12], 12).tokens, greedy(stock, ids[:, :-12], 12))
    return "equal" if same and difference < TOLERANCE else "different", difference


def table() -> str:
    """The report: a count and a row for each configuration."""
    sources = {name: entry["source"] for name, entry in json.loads(DATA.read_text(encoding="utf-8")).items()}
    rows, equal = list[str](), 0
    for name, config in published().items():
        with tempfile.TemporaryDirectory() as folder:
            verdict, difference = compare(config, Path(folder))
        equal += verdict == "equal"
        shown = "-" if difference is None else f"{difference:.0e}"
        text = verdict if difference is not None else f"refused: {verdict.split(': use ')[0]}"
        rows.append(f"| {name} | {config['model_type']} | {sources[name]} | {text} | {shown} |")
        print(rows[-1][:150], file=sys.stderr, flush=True)
    return "\n".join(
        [
            "**Published configurations at tiny width**",
            "",
            "| configuration | model type | source | result | largest difference |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"{equal} of {len(rows)} load and compute what stock transformers {transformers.__version__} computes: "
            "logits of a text and of a padded batch in float32 (largest difference of a logit in standard deviations "
            'of the logits) and 12 greedy tokens, with random weights. "copy": keys and values were read from a public '
            'copy of config.json; "recalled": they were written from knowledge of it. Made by '
            "`python -m experiments.studies.published_configs OUT`.",
            "",
        ]
    )


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    out = table()
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(out, encoding="utf-8", newline="\n")
    else:
        print(out)


if __name__ == "__main__":
    main()
