"""`ease serve` answers the client of OpenAI with the tokens of `ease generate`, and ends in one line."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from data_chat import chat_checkpoint

import ease
from ease.cli.main import main
from ease.runs.reopen import load_start

PACKAGES = ("fastapi", "uvicorn", "openai", "transformers")
for package in PACKAGES:
    pytest.importorskip(package, reason=f"the extra serve is not installed: it needs {package}")

import openai  # noqa: E402
from transformers import GenerationConfig  # noqa: E402

from ease.hf.prompting import chat_prompt  # noqa: E402
from ease.hf.serving import ServedModel, server  # noqa: E402

PROMPT, LENGTH = "def wrap(self", 24
LISTEN = ("--host", "127.0.0.1", "--port")
COMMAND = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it by default
runpy.run_module("ease", run_name="__main__", alter_sys=True)
"""
STARTED = re.compile(r"ease: serving (.+) in mode (\w+) at (http://127\.0\.0\.1:(\d+)/v1)\n")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a chat template, two exits and a policy."""
    source = chat_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint")
    model = ease.from_pretrained(source)
    model.policy = ease.Policy((1, 2), (0.2, 0.3))
    folder = tmp_path_factory.mktemp("served") / "checkpoint"
    ease.save_pretrained(model, folder, tokenizer=source)
    return folder


@pytest.fixture(scope="module")
def command(checkpoint: Path) -> Iterator[subprocess.Popen[str]]:
    """`ease serve` in a process of its own, which starts while other tests run."""
    args = [sys.executable, "-c", COMMAND, "serve", str(checkpoint), *LISTEN, "0", "--dtype", "bfloat16"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@contextmanager
def served(name: Path, mode: Any, **options: Any) -> Iterator[tuple[openai.OpenAI, list[dict[str, Any]]]]:
    """A client of a server in a thread, and the statistics of its answers."""
    start, reports = load_start(str(name)), list[dict[str, Any]]()

    def report(answer: Any, stats: dict[str, Any]) -> None:
        reports.append(stats | {"exits": {token.exit for token in answer}})

    names = {"name": name.name, "mode": mode, "checkpoint": start.checkpoint, "stop": start.stop, "report": report}
    serving = server(start.model, start.tokenizer, **(names | options))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serving.run, kwargs={"sockets": [listening]})
        thread.start()
        with openai.OpenAI(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}/v1", api_key="none") as client:
            try:
                yield client, reports
            finally:
                serving.should_exit = True
                thread.join()


def expected(
    name: Path, mode: Any, prompt: str = PROMPT, *, special: bool = True, dtype: str = "float32", **sampling: Any
) -> tuple[str, torch.Tensor]:
    """The text that `ease.generate` continues a prompt with, and the exits."""
    start = load_start(str(name), dtype)
    ids = torch.tensor([start.tokenizer.encode(prompt, add_special_tokens=special).ids])
    answer = ease.generate(start.model, ids, LENGTH, mode, stop=start.stop, **sampling)
    return start.tokenizer.decode(answer.tokens[0].tolist()), answer.exits


@pytest.mark.usefixtures("command")
@pytest.mark.parametrize("mode", ["full", "routed", "exact"])
def test_an_answer_has_the_tokens_of_generate(mode: Any, checkpoint: Path) -> None:
    text, exits = expected(checkpoint, mode)
    chat, _ = expected(checkpoint, mode, chat_prompt(checkpoint, "hi"), special=False)
    messages: Any = [{"role": "user", "content": "hi"}]
    with served(checkpoint, mode) as (client, reports):
        assert [model.id for model in client.models.list()] == ["checkpoint"]
        answer = client.completions.create(model="checkpoint", prompt=PROMPT, max_tokens=LENGTH)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, "length")
        chunks = list(
            client.chat.completions.create(model="checkpoint", messages=messages, max_tokens=LENGTH, stream=True)
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == chat
        assert len(chunks) > 3, "the answer comes in pieces"
    assert [each["tokens"] for each in reports] == [answer.usage.completion_tokens, chunks[-1].usage.completion_tokens]
    if mode == "routed":
        assert reports[0]["exits"] == {*exits[0].tolist()}
        assert len(reports[0]["exits"]) > 1
    assert ("acceptance" in reports[0]) == (mode == "exact")


def test_settings_of_a_request(checkpoint: Path) -> None:
    request = {"model": "checkpoint", "prompt": PROMPT, "max_tokens": LENGTH}
    text, _ = expected(checkpoint, "routed", repetition_penalty=1.3)
    with served(checkpoint, "routed", stop=(), sampling={"repetition_penalty": 1.3}) as (client, reports):

        def complete(**settings: Any) -> Any:
            return client.completions.create(**(request | settings))

        assert complete().choices[0].text == text
        sampled = {complete(temperature=2.0, seed=seed).choices[0].text for seed in range(3)}
        assert len(sampled) > 1, "a temperature samples"
        assert complete(temperature=2.0, seed=0).choices[0].text in sampled
        stopped = complete(stop="ac").choices[0]
        assert (stopped.text, stopped.finish_reason) == (text[: text.index("ac") + 2], "stop")
        long = complete(max_tokens=4000)
        assert (long.usage.total_tokens, long.choices[0].finish_reason) == (129, "length"), "as many as positions allow"
        for wrong, says in (
            ({"prompt": PROMPT * 50}, "exceed the model's 128 positions"),
            ({"frequency_penalty": -1.5}, "repetition_penalty"),
            ({"extra_body": {"generation_config": json.dumps({"num_beams": 2, "max_new_tokens": 3})}}, "num_beams"),
        ):
            with pytest.raises(openai.BadRequestError, match=says):
                complete(**wrong)
        assert len(reports) == 7, "refused requests are not answered"


def test_without_a_chat_template_a_chat_is_refused(checkpoint: Path) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    with served(checkpoint, "full", checkpoint=None) as (client, _):  # as a run with a tokenizer of its own
        answer = client.completions.create(model="checkpoint", prompt=PROMPT, max_tokens=LENGTH)
        assert answer.choices[0].text == expected(checkpoint, "full")[0]
        with pytest.raises(openai.BadRequestError, match="checkpoint has no chat template: use /v1/completions"):
            client.chat.completions.create(model="checkpoint", messages=messages)


def test_an_answer_ends_when_the_server_stops(checkpoint: Path) -> None:
    model, config = ServedModel.wrap(load_start(str(checkpoint)).model), GenerationConfig(max_new_tokens=LENGTH)
    model.mode, model.report, model.stopping = "full", lambda answer, stats: None, lambda: True
    ids = model.generate(input_ids=torch.tensor([[5, 6, 7]]), generation_config=config, tokenizer=None)
    assert (ids.shape, config.max_new_tokens) == ((1, 4), 1), "by length, as the server will say"


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal as POSIX does")
def test_the_command_logs_requests_and_ends_in_one_line(
    command: subprocess.Popen[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.stderr is not None
    found = STARTED.fullmatch(command.stderr.readline())
    assert found is not None
    assert found.groups()[:2] == (str(checkpoint), "routed"), "as the checkpoint's policy says"
    with openai.OpenAI(base_url=found[3], api_key="none") as client:
        answer = client.completions.create(model=found[1], prompt=PROMPT, max_tokens=LENGTH)
    text, exits = expected(checkpoint, "routed", dtype="bfloat16")
    assert answer.choices[0].text == text
    assert main(["serve", str(checkpoint), *LISTEN, found[4]]) == 2
    assert capsys.readouterr().err.startswith(f"ease: port {found[4]} of 127.0.0.1 cannot be listened at (Address")
    command.send_signal(signal.SIGINT)
    out, log = command.communicate(timeout=60)
    assert (command.returncode, out) == (130, "")
    line, end = log.splitlines()
    shares = ", ".join(f"layer {exit}: {exits.eq(exit).double().mean():.0%}" for exit in exits.unique())
    speed, layers = r"24 tokens, \d+\.\d per second", r"\d\.\d of 3 layers run per token"
    assert re.fullmatch(f"ease: {speed}; predicted at {shares}; {layers}", line)
    assert end == "ease: interrupted; the server has stopped"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["no/such/model"], "there is no folder no/such/model"),
        (["x", "--port", "70000"], "--port must be at most 65535"),
        (["x", "--host", "no.such.host.invalid"], "cannot be listened at"),
        (["x", "--mode", "exact", "--threshold", "0.5"], "--threshold applies to mode routed"),
    ],
)
def test_bad_input_is_one_sentence_of_serve(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    free = [] if "--port" in options else ["--port", "0"]
    assert main(["serve", *options, *free]) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert shown.err.count("\n") == 1


def test_an_unknown_mode_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "x", "--mode", "fast"])
    assert caught.value.code == 2
    assert "invalid choice 'fast' for argument '--mode'" in " ".join(capsys.readouterr().err.split())


def test_a_missing_extra_of_serve_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "x"]) == 2
    assert capsys.readouterr().err == (
        "ease: this needs the package uvicorn: pip install -e '.[serve]' in a checkout of ease\n"
    )
