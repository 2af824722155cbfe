"""Checkpoints of the Hugging Face ecosystem, in and out.

Importing this package does not import transformers: `ease.hf.model` (`EaseForCausalLM`) and `ease.hf.lm_eval` do.
"""

from ease.hf.checkpoint import end_of_text, from_pretrained, load_tokenizer, save_pretrained

__all__ = ["end_of_text", "from_pretrained", "load_tokenizer", "save_pretrained"]
