"""GGUF files: dequantized once into a checkpoint folder of the cache."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import ease
from ease import EaseError
from ease.hf.checkpoint import load_tokenizer

V, D, L, H, KV, F = 64, 32, 2, 4, 2, 64


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Qwen2 with random weights, whose matrices are quantized to 8 bits."""
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_block_count(L)
    writer.add_feed_forward_length(F)
    writer.add_head_count(H)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    letters = [chr(code) for code in range(ord("!"), ord("!") + V - 3)]
    writer.add_token_list([*letters, '!"', "<|endoftext|>", "<|im_end|>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * (V - 2) + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(['! "'])
    writer.add_eos_token_id(V - 1)
    writer.add_bos_token_id(V - 2)
    shapes = {"token_embd": (V, D), "output": (V, D)}
    for layer in range(L):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_q": (D, D),
                "attn_k": (KV * D // H, D),
                "attn_v": (KV * D // H, D),
                "attn_output": (D, D),
                "ffn_gate": (F, D),
                "ffn_up": (F, D),
                "ffn_down": (D, F),
            }.items()
        }
        for name in ("attn_q", "attn_k", "attn_v"):
            size = shapes[f"blk.{layer}.{name}"][0]
            writer.add_tensor(f"blk.{layer}.{name}.bias", random.normal(size=size).astype(np.float32))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(D, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(D, np.float32))
    for name, shape in shapes.items():
        values = random.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def test_a_gguf_file_loads_as_transformers_reads_it_and_is_dequantized_once(file: Path) -> None:
    with pytest.warns(UserWarning, match="tiny.gguf is dequantized to float32 into"):
        model = ease.from_pretrained(file)
    stock = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    ids = torch.randint(0, V, (2, 12))
    torch.testing.assert_close(model(ids), stock(ids).logits, rtol=1e-4, atol=1e-4)
    ease.from_pretrained(file)  # without a warning
    assert load_tokenizer(file).get_vocab_size() == V


def test_a_file_that_is_no_gguf_is_refused(file: Path) -> None:
    file.write_bytes(b"GGUF" + bytes(40))
    with pytest.warns(UserWarning, match="dequantized"), pytest.raises(EaseError, match="could not be read as GGUF"):
        ease.from_pretrained(file)
