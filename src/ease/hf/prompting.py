"""What a checkpoint has beside its weights: tokenizer, chat template, end tokens and sampling defaults.

transformers reads the tokenizer, so that ids are those of its `AutoTokenizer`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ease.data.tokenizers import prepare, read_tokenizer_json
from ease.errors import EaseError, check_integer, check_number, first_line, require
from ease.hf.families import FAMILIES
from ease.hf.folder import CONFIG, FIX, GENERATION, NATIVE, TOKENIZER_FILES, checkpoint_folder, read_json
from ease.hf.options import PLACING, read_options

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Values of generation_config.json that `ease.generate` has no setting for, with those that change nothing.
OTHER_SETTINGS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("min_p", "top_h", "epsilon_cutoff", "eta_cutoff", "penalty_alpha"), (None, 0)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (None, 0)),
    **dict.fromkeys(("min_length", "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id"), (None, 0)),
    **dict.fromkeys(("typical_p", "num_beams", "encoder_repetition_penalty"), (None, 1)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"), (None, [], {})),
    "stop_strings": (None, [], ""),
    "guidance_scale": (None, 1),
}

# ---------------------------------------------------------------------------------------------------------
# Tokenizer


def copy_prompting(source: Path, folder: Path, *, config: bool) -> None:
    """Copies everything but the weights of a checkpoint, and its config.json if `config` is set, into a folder."""
    for pattern in (*TOKENIZER_FILES, GENERATION, *([CONFIG] if config else [])):
        for file in source.glob(pattern):
            if file.is_file():
                target = folder / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)  # follows the links of the hub's cache


def auto_tokenizer(folder: Path) -> Any:
    """The tokenizer that transformers' `AutoTokenizer` loads from a checkpoint, without running code of it.

    Raises:
        EaseError: there is none, or a file is damaged.
    """
    if not any(file.is_file() for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        raise EaseError(
            f"{folder} has no tokenizer.json: write one with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    if (folder / "tokenizer.json").is_file():
        read_tokenizer_json(folder / "tokenizer.json")
    settings = {
        name: read_json(folder / name)
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        if (folder / name).is_file()
    }
    stated = settings.get("tokenizer_config.json", {}).get("tokenizer_class")
    native = read_json(folder / CONFIG).get("model_type") == NATIVE
    transformers = require("transformers", "hf")
    # transformers knows no tokenizer for the model type of a native checkpoint.
    kind = transformers.PreTrainedTokenizerFast if native and not stated else transformers.AutoTokenizer
    try:
        return kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except BaseException as error:  # libraries raise many kinds, and tokenizers a PanicException, which is none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise EaseError(f"transformers cannot load the tokenizer in {folder} ({first_line(error)}): {FIX}") from error


def load_tokenizer(
    name_or_path: str | os.PathLike[str], *, split_special_tokens: bool | None = None, **options: Any
) -> Tokenizer:
    """Loads the tokenizer of a checkpoint, in the form that `ease.data` uses; its ids are those of `AutoTokenizer`.

    Args:
        name_or_path: as for `from_pretrained`.
        split_special_tokens: whether text that spells a special token, such as `<|im_start|>`, stays text; by default
            as in transformers, which reads the token unless tokenizer_config.json says otherwise.
        options: which files are fetched, as for `from_pretrained`: `revision`, `subfolder`, `token`, ...

    Raises:
        EaseError: the checkpoint has no tokenizer, or one with more ids than the model's embedding has rows.
    """
    if refused := [name for name in PLACING if options.get(name) is not None]:
        raise EaseError(f"{', '.join(refused)} is for weights, and a tokenizer has none: leave it out")
    folder = read_options(name_or_path, options).folder
    loaded = auto_tokenizer(folder)
    if not getattr(loaded, "is_fast", False):
        raise EaseError(
            f"the tokenizer in {folder} has no fast form, which ease needs: write a tokenizer.json with transformers"
        )
    if split_special_tokens is None:
        split_special_tokens = bool(loaded.split_special_tokens)
    tokenizer: Tokenizer = prepare(loaded.backend_tokenizer, split_special_tokens)
    raw = read_json(folder / CONFIG)
    rows = max(tokenizer.get_vocab().values(), default=-1) + 1
    native = raw.get("model")  # of EaseForCausalLM
    vocab_size: Any = raw.get("vocab_size") or (native.get("vocab_size") if isinstance(native, dict) else None)
    check_integer(f"vocab_size in {folder / CONFIG}", vocab_size, 1)
    if rows > vocab_size:
        raise EaseError(
            f"the tokenizer in {folder} has ids up to {rows - 1}, but the model's embedding has {vocab_size} rows: use "
            "the tokenizer that the model was trained with"
        )
    return tokenizer


def chat_prompt(folder: Path, message: str) -> str:
    """The prompt that a checkpoint's chat template makes of a user's message, ready for the assistant's answer.

    Raises:
        EaseError: the checkpoint has no chat template, or it does not apply to a single message.
    """
    tokenizer = auto_tokenizer(folder)
    if not tokenizer.chat_template:
        raise EaseError(f"{folder} has no chat template: leave out --chat, or add chat_template.jinja")
    try:
        messages = [{"role": "user", "content": message}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # what a template raises, and errors of jinja2
        raise EaseError(f"the chat template in {folder} failed ({first_line(error)}): leave out --chat") from error


# ---------------------------------------------------------------------------------------------------------
# Special tokens and sampling


def token_ids(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of special tokens in the content of a config.json; a key left out has the default of its family."""
    family = FAMILIES.get(str(raw.get("model_type")))
    values = {**(family.token_ids if family else {}), **raw}
    return {name: values[name] for name in TOKEN_IDS if name in values}


def end_tokens(name_or_path: str | os.PathLike[str]) -> tuple[int, ...]:
    """The ids that end a generated text for a checkpoint: those in generation_config.json, or else in config.json.

    Args:
        name_or_path: as for `from_pretrained`.

    Raises:
        EaseError: the checkpoint is missing, or an id is no integer.

    Example:
        >>> ease.generate(model, ids, 64, stop=ease.hf.end_tokens("HuggingFaceTB/SmolLM2-135M-Instruct"))
    """
    folder = checkpoint_folder(name_or_path)
    ids = _read_generation(folder).get("eos_token_id")
    if ids is not None:
        return _end_ids(GENERATION, ids)
    return _end_ids(CONFIG, token_ids(read_json(folder / CONFIG)).get("eos_token_id"))


def end_of_text(name_or_path: str | os.PathLike[str]) -> int | None:
    """The id that ends a document in the training text of a checkpoint, or None. Of several ids it is the first."""
    raw = read_json(checkpoint_folder(name_or_path) / CONFIG)
    return next(iter(_end_ids(CONFIG, token_ids(raw).get("eos_token_id"))), None)


def _end_ids(file: str, value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        check_integer(f"eos_token_id in {file}", i, -1)
    return tuple(i for i in ids if i >= 0)  # -1 in some checkpoints means that there is none


def sampling_defaults(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The sampling settings of a checkpoint's generation_config.json, with which transformers would generate.

    Returns:
        As `sampling_settings`.
    """
    return sampling_settings(_read_generation(folder), str(folder / GENERATION))


def sampling_settings(raw: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """Sampling settings in transformers' names, as keyword arguments of `ease.generate`.

    Args:
        raw: fields of a `GenerationConfig`.
        source: where they come from, for errors.

    Returns:
        Keyword arguments of `ease.generate`, and the names of settings that it does not have.

    Raises:
        EaseError: a setting is not a number, or is negative.
    """
    others = [name for name, neutral in OTHER_SETTINGS.items() if raw.get(name) not in neutral]

    def number(name: str, default: float) -> Any:
        value = default if raw.get(name) is None else raw[name]
        check_number(f"{name} in {source}", value, 0)
        return value

    settings: dict[str, Any] = {"repetition_penalty": number("repetition_penalty", 1.0)}
    if raw.get("do_sample"):  # with transformers' defaults for what is left out
        temperature, top_k, top_p = number("temperature", 1.0), number("top_k", 50), number("top_p", 1.0)
        settings |= {"temperature": temperature, "top_k": int(top_k) or None, "top_p": top_p if top_p < 1 else None}
    return settings, others


def _read_generation(folder: Path) -> dict[str, Any]:
    return read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
