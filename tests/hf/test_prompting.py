"""What a checkpoint has beside its weights is read as transformers reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from data_chat import SPECIAL, chat_checkpoint, random_texts

import ease
from ease.errors import EaseError
from ease.hf.prompting import chat_prompt, copy_prompting, end_of_text, end_tokens, load_tokenizer, sampling_defaults

transformers = pytest.importorskip("transformers")

from ease.hf.model import EaseForCausalLM  # noqa: E402


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_checkpoint(tmp_path_factory.mktemp("chat") / "checkpoint")


@pytest.fixture
def chat(shared: Path, tmp_path: Path) -> Path:
    """A checkpoint to change."""
    return Path(shutil.copytree(shared, tmp_path / "chat"))


def edit(file: Path, **changes: Any) -> Path:
    """Sets keys of a JSON file; `...` takes a key out."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    return file.parent


def pairs_only(folder: Path) -> None:
    """The vocabulary and merges of a byte-level BPE in two files, as GPT-2 and Qwen have them."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    (folder / "tokenizer.json").unlink()
    edit(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", unk_token="<|end|>")


def cut_and_padded(folder: Path) -> None:
    """A tokenizer.json that was saved after a call with truncation and padding."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=12)
    tokenizer.save(str(folder / "tokenizer.json"))


KINDS = {
    "as saved": lambda folder: None,
    "vocabulary and merges": pairs_only,
    "cut and padded": cut_and_padded,
    "special tokens are text": lambda folder: edit(folder / "tokenizer_config.json", split_special_tokens=True),
    "without tokenizer_config.json": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "of a class": lambda folder: edit(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_gives_the_ids_of_transformers(chat: Path, kind: str) -> None:
    KINDS[kind](chat)
    stock, own = transformers.AutoTokenizer.from_pretrained(chat), load_tokenizer(chat)
    texts = random_texts(300)
    assert [own.encode(text).ids for text in texts] == stock(texts).input_ids


def test_special_tokens_in_a_text_stay_text_on_request(chat: Path) -> None:
    stock, own = transformers.AutoTokenizer.from_pretrained(chat), load_tokenizer(chat, split_special_tokens=True)
    texts = random_texts(100)
    assert [own.encode(text).ids for text in texts] == stock(texts, split_special_tokens=True).input_ids
    assert own.decode(own.encode("".join(SPECIAL)).ids) == "".join(SPECIAL)


def test_a_native_checkpoint_has_the_tokenizer_that_is_saved_beside_it(chat: Path, tmp_path: Path) -> None:
    model, stock = EaseForCausalLM.from_pretrained(chat), transformers.AutoTokenizer.from_pretrained(chat)
    model.save_pretrained(tmp_path / "native")
    shutil.copy(chat / "tokenizer.json", tmp_path / "native")
    text = "".join(random_texts(20))
    assert load_tokenizer(tmp_path / "native").encode(text).ids == stock(text).input_ids
    stock.save_pretrained(tmp_path / "native")
    assert load_tokenizer(tmp_path / "native").encode(text).ids == stock(text).input_ids
    assert end_tokens(tmp_path / "native") == end_tokens(chat) == (1, 4)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", "{"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "NoSuchTokenizer", "auto_map": {"AutoTokenizer": ["a.B", null]}}',
        ),
        ("tokenizer_config.json", '{"bos_token": 3}'),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": 3}}'),
        ("tokenizer.json", '{"version": "1.0"}'),
    ],
)
def test_a_damaged_tokenizer_is_one_sentence(chat: Path, file: str, content: str) -> None:
    (chat / file).write_text(content)
    with pytest.raises(EaseError, match="tokenizer") as caught:
        load_tokenizer(chat)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------
# End tokens


def test_the_end_tokens_are_all_those_of_the_generation_config(chat: Path) -> None:
    assert (end_tokens(chat), end_of_text(chat)) == ((1, 4), 1)
    edit(chat / "generation_config.json", eos_token_id=4)
    assert end_tokens(chat) == (4,)
    edit(chat / "generation_config.json", eos_token_id=...)
    assert end_tokens(chat) == (1, 4), "those of config.json"
    (chat / "generation_config.json").unlink()
    edit(chat / "config.json", eos_token_id=[-1, 4])
    assert (end_tokens(chat), end_of_text(chat)) == ((4,), 4)
    for none in (None, -1, []):
        edit(chat / "config.json", eos_token_id=none)
        assert (end_tokens(chat), end_of_text(chat)) == ((), None)
    edit(chat / "config.json", eos_token_id=...)
    assert end_tokens(chat) == (transformers.AutoConfig.from_pretrained(chat).eos_token_id,)
    edit(chat / "config.json", eos_token_id=["</s>"])
    with pytest.raises(EaseError, match=r"eos_token_id in config\.json must be an integer"):
        end_tokens(chat)


def second_token(folder: Path, ids: torch.Tensor) -> int:
    """A token that the model generates after another one, and not first."""
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder)
    free = stock.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()
    return int(next(token for token in free[2:] if token not in free[:2]))


def test_every_end_token_ends_a_row_as_in_transformers(chat: Path) -> None:
    ids = torch.tensor([load_tokenizer(chat).encode("def f").ids])
    edit(chat / "generation_config.json", eos_token_id=[1, second_token(chat, ids)])
    expected = transformers.AutoModelForCausalLM.from_pretrained(chat).generate(ids, max_new_tokens=12)
    assert ids.shape[1] < expected.shape[1] < ids.shape[1] + 12
    assert torch.equal(EaseForCausalLM.from_pretrained(chat).generate(ids, max_new_tokens=12), expected)
    model = ease.from_pretrained(chat)
    model.policy = ease.Policy((1,), (1.0,))  # no token leaves
    for mode, options in (("full", {}), ("routed", {}), ("exact", {"draft_exit": 1})):
        answer = ease.generate(model, ids, 12, mode, stop=end_tokens(chat), **options)
        assert torch.equal(torch.cat([ids, answer.tokens], 1), expected), mode


# ---------------------------------------------------------------------------------------------------------
# Sampling defaults, chat templates and copies


def test_sampling_defaults_are_those_that_transformers_would_use(chat: Path) -> None:
    greedy = {"repetition_penalty": 1.0}
    assert sampling_defaults(chat) == (greedy, [])
    edit(chat / "generation_config.json", temperature=0.6, top_p=0.9, repetition_penalty=1.1, min_p=0.1)
    assert sampling_defaults(chat) == ({"repetition_penalty": 1.1}, ["min_p"]), "do_sample is not set"
    edit(chat / "generation_config.json", do_sample=True, min_p=None, num_beams=1)
    stated = {"temperature": 0.6, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1}
    assert sampling_defaults(chat) == (stated, [])
    edit(chat / "generation_config.json", top_k=0, top_p=1.0)
    assert sampling_defaults(chat)[0] == stated | {"top_k": None, "top_p": None}
    edit(chat / "generation_config.json", temperature="warm")
    with pytest.raises(EaseError, match=r"temperature in .*generation_config\.json must be a number"):
        sampling_defaults(chat)
    (chat / "generation_config.json").unlink()
    assert sampling_defaults(chat) == (greedy, [])


def test_a_chat_prompt_is_that_of_the_template(chat: Path) -> None:
    stock, message = transformers.AutoTokenizer.from_pretrained(chat), [{"role": "user", "content": "hi <|im_end|>"}]
    expected = stock.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    prompt = chat_prompt(chat, "hi <|im_end|>")
    assert load_tokenizer(chat).encode(prompt, add_special_tokens=False).ids == expected
    (chat / "chat_template.jinja").write_text("{{ raise_exception('no users') }}")
    with pytest.raises(EaseError, match="no users"):
        chat_prompt(chat, "hi")
    (chat / "chat_template.jinja").unlink()
    with pytest.raises(EaseError, match="has no chat template: leave out --chat"):
        chat_prompt(chat, "hi")


def test_a_copy_has_every_file_of_the_tokenizer_and_no_code(chat: Path, tmp_path: Path) -> None:
    files = ["special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"]
    files += ["additional_chat_templates/tool.jinja", "tokenizer.model.v3", "qwen.tiktoken"]
    for name in (*files, "tokenization_own.py", "notes.txt", "tokenizer.py"):
        (chat / name).parent.mkdir(exist_ok=True)
        (chat / name).write_text(name)
    files += ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
    copy_prompting(chat, tmp_path / "copy", config=False)
    copied = {path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*.*")}
    assert copied == set(files)
    assert all((tmp_path / "copy" / name).read_bytes() == (chat / name).read_bytes() for name in files)
    copy_prompting(chat, tmp_path / "copy", config=True)
    assert (tmp_path / "copy" / "config.json").is_file()
