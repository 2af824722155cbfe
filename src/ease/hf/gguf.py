"""GGUF files, read through transformers: dequantized once into a checkpoint folder, which is kept in the cache."""

from __future__ import annotations

import warnings
from pathlib import Path

from ease.errors import EaseError, first_line, require
from ease.files import cache_folder, checksum
from ease.storage import output_folder


def dequantized(path: Path) -> Path:
    """The checkpoint folder with the weights of a GGUF file in float32, its configuration and its tokenizer.

    The first call warns where the folder is; later calls find it there.

    Raises:
        EaseError: the file is damaged, of a family that transformers does not read, or there is no space.
    """
    transformers = require("transformers", "hf")
    require("gguf", "gguf")
    folder = cache_folder() / "gguf" / f"{path.stem}-{checksum(path)[:16]}"
    if folder.is_dir():
        return folder
    warnings.warn(f"{path} is dequantized to float32 into {folder}, which ease reads from now on", stacklevel=3)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # of two libraries, and several kinds
        raise EaseError(
            f"{path} could not be read as GGUF ({first_line(error)}): use a safetensors checkpoint of the model"
        ) from error
    # What is left of the quantization would refuse to be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    with output_folder(folder, overwrite=False) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder
