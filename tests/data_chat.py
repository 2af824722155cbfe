"""A tiny stock checkpoint with chat tokens, a chat template, two end tokens and left padding, and random texts."""

import inspect
import random
import textwrap
from pathlib import Path
from typing import Any

import torch

TEXT = inspect.getsource(textwrap)
BOS, END, PAD, IM_START, IM_END = SPECIAL = ("<|bos|>", "<|end|>", "<|pad|>", "<|im_start|>", "<|im_end|>")  # ids 0..4
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIECES = (
    *SPECIAL,
    "<eos>",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u00a0",
    "def wrap(",
    "self",
    "é",
    "e\u0301",
    "日本",
    "🙂",
    "\x00",
)


def random_texts(number: int) -> list[str]:
    """Texts of words, white space, all of Unicode and special tokens."""
    draw = random.Random(0)
    return ["".join(draw.choices(PIECES, k=draw.randint(0, 12))) for _ in range(number)]


def chat_checkpoint(folder: Path, end: Any = (1, 4), **generation: Any) -> Path:
    """Writes the checkpoint; `generation` are further fields of its generation_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=290,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    inner.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=BOS,
        eos_token=IM_END,
        pad_token=PAD,
        additional_special_tokens=[IM_START],
        padding_side="left",
        model_max_length=128,
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": list(end), "pad_token_id": 2}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=296, max_position_embeddings=128, initializer_range=0.3, **shape, **ids)
    )
    model.generation_config = GenerationConfig(**ids, **generation)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
