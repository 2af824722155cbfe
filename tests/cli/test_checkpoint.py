"""A checkpoint comes back as it went in: what `ease tune` keeps of it, for `ease export` and `ease generate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from data_chat import TEXT, chat_checkpoint, random_texts
from data_runs import SHORT
from rich.control import strip_control_codes

import ease
from ease.cli.main import main
from ease.hf.prompting import load_tokenizer
from ease.runs.reopen import evaluate, load_start, open_run

transformers = pytest.importorskip("transformers")

MESSAGES = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in random_texts(50)
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with every file that a tokenizer may have, which stays while its runs must not need it."""
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20}
    folder = chat_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", **sampling)
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|bos|>", "eos_token": "<|im_end|>"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 3}))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages[0]['content'] }}")
    return folder


@pytest.fixture(scope="module")
def tuned(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on chats and code that started from a copy of the source, which is gone."""
    folder = tmp_path_factory.mktemp("tuned")
    stock = transformers.AutoTokenizer.from_pretrained(source)
    chats = "".join(stock.apply_chat_template(each, tokenize=False) for each in MESSAGES).replace("\x00", "")
    (folder / "text.txt").write_text((chats + TEXT) * 3, encoding="utf-8")
    start = shutil.copytree(source, folder / "start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EASE_CACHE", str(folder / "cache"))
        options = ["--exits=1", "--max-epochs", "1", "--data", str(folder / "text.txt"), *SHORT]
        assert main(["tune", str(start), *options, "--out", str(folder / "first")]) == 0
        shutil.rmtree(start)
        assert main(["tune", str(folder / "first"), *options, "--out", str(folder / "run")]) == 0
        shutil.rmtree(folder / "first")
    return folder / "run"


@pytest.fixture(autouse=True)
def _cache(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASE_CACHE", str(tuned.parent / "cache"))


def behaviour(folder: Path) -> list[Any]:
    """What stock tools see of a checkpoint's tokenizer and generation settings."""
    stock = transformers.AutoTokenizer.from_pretrained(folder)
    generation = transformers.GenerationConfig.from_pretrained(folder).to_dict()
    config = transformers.AutoConfig.from_pretrained(folder)
    return [
        stock(random_texts(1000)).input_ids,
        [stock.apply_chat_template(each, add_generation_prompt=True, return_dict=False) for each in MESSAGES],
        stock.chat_template,
        (stock.bos_token, stock.eos_token, stock.pad_token, stock.padding_side, stock.model_max_length),
        {key: value for key, value in generation.items() if key != "transformers_version"},
        (config.bos_token_id, config.eos_token_id, config.pad_token_id),
    ]


def files_beside(folder: Path) -> dict[str, bytes]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {
        name: (folder / name).read_bytes()
        for name in names
        if name != "config.json" and not name.endswith(".safetensors") and not name.startswith("ease/")
    }


def test_export_returns_what_the_source_had_and_so_does_an_export_of_that(
    source: Path, tuned: Path, tmp_path: Path
) -> None:
    expected = behaviour(source)
    assert main(["export", str(tuned), str(tmp_path / "exported")]) == 0
    assert files_beside(tmp_path / "exported") == files_beside(source)
    assert behaviour(tmp_path / "exported") == expected
    again = ease.from_pretrained(tmp_path / "exported")
    ease.save_pretrained(again, tmp_path / "again", tokenizer=tmp_path / "exported")
    assert files_beside(tmp_path / "again") == files_beside(source)
    assert behaviour(tmp_path / "again") == expected
    own = load_tokenizer(tmp_path / "again")
    assert [own.encode(text).ids for text in random_texts(1000)] == expected[0]


def test_a_run_reads_texts_and_special_tokens_as_its_source_does(source: Path, tuned: Path) -> None:
    stock = transformers.AutoTokenizer.from_pretrained(source)
    start = load_start(str(tuned))
    texts = random_texts(1000)
    assert [start.tokenizer.encode(text).ids for text in texts] == stock(texts).input_ids
    assert (start.eos, start.stop) == (1, (1, 4))
    corpus = open_run(tuned)[2]
    assert (corpus.train == 3).sum() > 50, "<|im_start|> of the chats"
    assert corpus.train[0] == 0, "the tokenizer's bos"
    # What the run reported is what evaluating it again gives.
    summary = json.loads((tuned / "summary.json").read_text())
    test = next(line["test"] for line in summary["lines"] if line["name"] == "exit tuning")
    assert evaluate(tuned, [])[0]["ppl"] == pytest.approx(test["ppl"])


def test_a_damaged_file_of_the_source_is_reported(tuned: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tuned, tmp_path / "run")
    (run / "start" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ease.EaseError, match=r"chat_template\.jinja is damaged"):
        load_start(str(run))


def test_a_run_of_before_keeps_its_reading(tuned: Path, tmp_path: Path) -> None:
    # Earlier versions kept the tokenizer alone, and cut special tokens in a text into characters.
    run = shutil.copytree(tuned, tmp_path / "run")
    shutil.rmtree(run / "start")
    (run / "SHA256SUMS").unlink()
    config = json.loads((run / "config.json").read_text())
    for key in ("split_special_tokens", "add_special_tokens"):
        del config["data"][key]
    del config["run"]["data"]["split_special_tokens"]
    old = ease.load_corpus(
        config["data"]["source"],
        load_start(str(run), split_special_tokens=True).tokenizer,
        eos=1,
        add_special_tokens=False,
    )
    config["data"]["hash"] = old.hash
    (run / "config.json").write_text(json.dumps(config))
    _, _, corpus, _ = open_run(run)
    assert not (corpus.train == 3).any()
    assert corpus.train.equal(old.train)
    assert load_start(str(run))[2:] == (1, (1,), None)
    assert main(["export", str(run), str(tmp_path / "exported")]) == 0


def test_training_text_without_control_tokens_on_request(source: Path, tuned: Path, tmp_path: Path) -> None:
    options = ["--exits=1", "--max-epochs", "1", "--data", str(tuned.parent / "text.txt"), *SHORT]
    options += ["--data.split-special-tokens", "True", "--out", str(tmp_path / "run")]
    assert main(["tune", str(source), *options]) == 0
    assert not (open_run(tmp_path / "run")[2].train == 3).any()
    assert load_start(str(tmp_path / "run")).tokenizer.encode("<|im_start|>").ids != [0, 3]
    assert load_start(str(tmp_path / "run"), split_special_tokens=False).tokenizer.encode("<|im_start|>").ids == [0, 3]


# ---------------------------------------------------------------------------------------------------------
# Generation


def generated(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[str, str]:
    """The output and the errors of `ease generate`."""
    capsys.readouterr()
    assert main(["generate", *args]) in (0, 2)
    shown = capsys.readouterr()
    return shown.out, shown.err


def complete(text: str) -> str:
    """A text as `ease generate` shows it: without control codes and an incomplete last character."""
    return strip_control_codes(text.rstrip("\ufffd")) + "\n"


def test_a_chat_prompt_is_answered_up_to_an_end_token(
    source: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = transformers.AutoTokenizer.from_pretrained(source)
    messages = [{"role": "user", "content": "hi"}]
    prompt = stock.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = stock(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    expected = model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
    options = ["--prompt", "hi", "--chat", "--max-new-tokens", "9", "--temperature", "0", "--mode", "full"]
    for folder in (source, tuned):  # the exits differ, and full depth does not
        out, err = generated(capsys, str(folder), *options)
        assert out == complete(prompt + stock.decode(expected, skip_special_tokens=True))
        assert f"{len(expected)} token" in err


def test_sampling_follows_the_source_and_explicit_options_win(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [str(tuned), "--prompt", "def", "--max-new-tokens", "12", "--mode", "full"]
    model, tokenizer, _, stop, _ = load_start(str(tuned))
    ids = torch.tensor([tokenizer.encode("def").ids])
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 20}
    for args, options in (
        ([], sampling),
        (["--top-k", "3", "--temperature", "2"], sampling | {"top_k": 3, "temperature": 2.0}),
        (["--temperature", "0"], None),
    ):
        seeded = ([], {}) if options is None else (["--seed", "1"], options | {"seed": 1})
        answer = ease.generate(model, ids, 12, stop=stop, **seeded[1])
        text = "def" + tokenizer.decode(answer.tokens[0, answer.exits[0] > 0].tolist())
        assert generated(capsys, *common, *seeded[0], *args)[0] == complete(text), args
    run = shutil.copytree(tuned, tmp_path / "run")
    (run / "SHA256SUMS").unlink()
    (run / "start" / "generation_config.json").write_text('{"num_beams": 4, "eos_token_id": 1}')
    assert "sets num_beams, which ease does not apply" in generated(capsys, str(run), *common[1:])[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--chat"], "did not start from a checkpoint with a chat template: leave out --chat"),
        (["--chat", "--split-special-tokens", "True"], "would also split the tokens of the chat template"),
    ],
)
def test_a_chat_that_cannot_be_is_refused(
    options: list[str], says: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = generated(capsys, str(made), "--prompt", "x", *options)
    assert says in err
    assert not out


def test_special_tokens_of_a_prompt_stay_text_on_request(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def generate(model: object, ids: torch.Tensor, *args: object, **options: object) -> None:
        seen.extend(ids[0].tolist())
        raise ease.EaseError("enough")

    monkeypatch.setattr("ease.generation.decode.generate", generate)
    generated(capsys, str(source), "--prompt", "<|im_start|>")
    assert seen == [0, 3]
    seen.clear()
    generated(capsys, str(source), "--prompt", "<|im_start|>", "--split-special-tokens", "True")
    assert seen[0] == 0
    assert 3 not in seen


def test_special_tokens_are_a_question_for_checkpoints_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "--data.split-special-tokens", "True"]) == 2
    assert "name one with --start" in capsys.readouterr().err
