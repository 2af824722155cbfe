"""Checkpoints of the Hugging Face ecosystem, read and written, and the native model as a transformers model.

    folder         a checkpoint on disk or on the hub
    options        the options of `from_pretrained`
    config         config.json <-> ModelConfig, with the table of supported families
    weights        stock names, safetensors files
    checkpoint     `from_pretrained`, `save_pretrained`
    prompting      tokenizer, chat template, end tokens, sampling defaults
    configuration  `EaseConfig`, the config.json of a native model
    peft           what PEFT looks up by model type
    model          `EaseForCausalLM`
    forward        its pass over the tokens of a call
    classifier     `EaseForSequenceClassification`
    generation     its `generate`
    backbone       its base model, without the head
    cache          its cache
    adapters       PEFT adapters merged into a model
    lm_eval        lm-evaluation-harness
    serving        the model behind transformers' OpenAI-compatible server

Importing this package does not import transformers; `configuration` and the files after it do,
except `peft`, and so does the reading of tokenizers.
"""

from ease.hf.checkpoint import from_pretrained, save_pretrained
from ease.hf.prompting import end_of_text, end_tokens, load_tokenizer

__all__ = ["end_of_text", "end_tokens", "from_pretrained", "load_tokenizer", "save_pretrained"]
