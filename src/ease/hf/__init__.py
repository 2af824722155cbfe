"""Checkpoints of the Hugging Face ecosystem, read and written, and the native model as a transformers model.

    folder         a checkpoint on disk or on the hub
    options        the options of `from_pretrained`
    config         config.json <-> ModelConfig, with the table of supported families
    weights        stock names, safetensors files
    checkpoint     `from_pretrained`, `save_pretrained`, tokenizers
    configuration  `EaseConfig`, the config.json of a native model
    model          `EaseForCausalLM`
    generation     its `generate`
    cache          its cache
    lm_eval        lm-evaluation-harness

Importing this package does not import transformers; the last five files do.
"""

from ease.hf.checkpoint import end_of_text, from_pretrained, load_tokenizer, save_pretrained

__all__ = ["end_of_text", "from_pretrained", "load_tokenizer", "save_pretrained"]
