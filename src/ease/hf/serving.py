"""A model behind the OpenAI-compatible server of transformers, the one that `transformers serve` starts.

- `LoadedModel` is the server's model manager, which loads models by name, with one model that is loaded already.
- `ServedModel.generate` decodes a request with `ease.generate`, in the mode that the server was started in.

Importing this module needs the extra `serve`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import uvicorn
from fastapi import Request
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast, StopStringCriteria
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerationState

from ease.errors import EaseError
from ease.generation.decode import Mode, generate
from ease.generation.request import Token
from ease.hf.folder import CONFIG, NATIVE, read_json
from ease.hf.model import EaseForCausalLM
from ease.hf.prompting import auto_tokenizer, sampling_settings
from ease.models import DeepSupervisionTransformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Report = Callable[[Sequence[Token], dict[str, Any]], None]


class _Ended(Exception):
    """Ends `ease.generate` before its limit."""


class ServedModel(EaseForCausalLM):
    """A model whose `generate` answers the requests of the server.

    Attributes:
        mode: how tokens are decoded.
        report: called after each answer with its tokens and the statistics that `ease.generate` gives. An answer that
            ended at a stop string has only "tokens" and "tokens_per_second".
        stopping: whether the server stops; the answer then ends with its next token.
    """

    mode: Mode
    report: Report
    stopping: Callable[[], bool]

    def generate(  # type: ignore[override]
        self,
        *,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        tokenizer: PreTrainedTokenizerBase,
        **_: Any,
    ) -> Tensor:
        """Continues a prompt with `ease.generate` as the request says.

        Args:
            input_ids: (1, T), the prompt.
            generation_config: the settings of the request. `max_new_tokens` is lowered to the positions that the model
                has left, and to the length of an answer that the server's end cut: the server compares the two.
            attention_mask: (1, T).
            streamer: takes the prompt, then each token.
            tokenizer: finds the request's stop strings.

        Returns:
            (1, T + N) ids, the prompt and the answer.

        Raises:
            EaseError: the request has a setting that `ease.generate` lacks, or one out of range.
        """
        config, prompt = generation_config, input_ids[0].tolist()
        if config.temperature:  # the server sets the temperature of a request, but not that it is sampled
            config.do_sample = True
        settings, others = sampling_settings(config.to_dict(), "the request")
        if refused := sorted({*others} - {"stop_strings"}):
            raise EaseError(f"{', '.join(refused)} is not a setting of ease: leave it out of the request")
        if config.max_new_tokens is not None and (positions := self.model.config.max_positions) is not None:
            config.max_new_tokens = max(1, min(config.max_new_tokens, positions + 1 - len(prompt)))
        ends = StopStringCriteria(tokenizer, config.stop_strings) if config.stop_strings else None
        answer: list[Token] = []

        def take(token: Token) -> None:
            answer.append(token)
            if streamer is not None:
                streamer.put(torch.tensor([token.token]))
            if self.stopping():
                config.max_new_tokens = len(answer)
                raise _Ended
            if ends is not None and ends(_ids(prompt, answer), None):
                raise _Ended

        if streamer is not None:
            streamer.put(input_ids.cpu())
        start = time.perf_counter()
        try:
            stats = generate(
                self.model,
                input_ids,
                config.max_new_tokens,
                self.mode,
                attention_mask=attention_mask,
                stop=config.eos_token_id or (),
                stream=take,
                **settings,
            ).stats
        except _Ended:
            stats = {"tokens": len(answer), "tokens_per_second": len(answer) / (time.perf_counter() - start)}
        if streamer is not None:
            streamer.end()
        self.report(answer, stats)
        return _ids(prompt, answer)


def _ids(prompt: list[int], answer: Sequence[Token]) -> Tensor:
    return torch.tensor([[*prompt, *(token.token for token in answer)]])


class LoadedModel(ModelManager):
    """The server's model manager, which gives one loaded model and knows no other.

    Args:
        name: the model's name for clients.
        model: the model.
        tokenizer: its tokenizer.
    """

    def __init__(self, name: str, model: ServedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._loaded, self._created = (model, tokenizer), int(time.time())
        super().__init__(force_model=name)

    def _load_model(self, *_: Any, **__: Any) -> Any:
        return self._loaded[0]

    def _load_processor(self, *_: Any, **__: Any) -> Any:
        return self._loaded[1]

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        """The served model alone; the server's own list is that of the hub's cache."""
        return [{"id": self.force_model, "object": "model", "created": self._created, "owned_by": "ease"}]


def server(
    model: DeepSupervisionTransformer,
    tokenizer: Tokenizer,
    *,
    name: str,
    mode: Mode,
    checkpoint: Path | None = None,
    stop: Sequence[int] = (),
    sampling: Mapping[str, Any] | None = None,
    report: Report = lambda answer, stats: None,
) -> uvicorn.Server:
    """The server of transformers with a model; its `run` answers requests, one after the other, until an interrupt.

    Args:
        model: the model, on its device.
        tokenizer: its tokenizer.
        name: the model's name for clients.
        mode: how tokens are decoded, as in `ease.generate`.
        checkpoint: the folder with the checkpoint's tokenizer, which has a chat template and replaces `tokenizer`, and
            config.json, whose model type tells the server how tool calls and reasoning are written.
        stop: ids that end an answer.
        sampling: temperature, top_k, top_p and repetition_penalty where a request does not state them.
        report: called after each answer (`ServedModel`).
    """
    if checkpoint is None:
        split = bool(tokenizer.encode_special_tokens)
        stock: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, split_special_tokens=split)
    else:
        stock = auto_tokenizer(checkpoint)
    if not stock.chat_template:
        says = f"{name} has no chat template: use /v1/completions, or add chat_template.jinja to the checkpoint"
        stock.chat_template = "{{ raise_exception(" + json.dumps(says) + ") }}"
    ends = list(stop) or None
    served = ServedModel.wrap(model, eos_token_id=ends, name_or_path=name)
    served.mode, served.report = mode, report
    if checkpoint is not None:
        served.config.model_type = read_json(checkpoint / CONFIG).get("model_type", NATIVE)  # type: ignore[misc]
    stated = dict(sampling or {})
    if "temperature" in stated:  # sampled; without a top_k, transformers has 50
        stated |= {"do_sample": True, "top_k": stated.get("top_k") or 0}
    served.generation_config = GenerationConfig(eos_token_id=ends, **stated)
    manager, state = LoadedModel(name, served, stock), GenerationState()
    app = build_server(
        manager,
        ChatCompletionHandler(manager, state),
        CompletionHandler(manager, state),
        ResponseHandler(manager, state),
        TranscriptionHandler(manager, state),
        SystemOneHandler(manager, state),
        state,
    )

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, 400)

    for kind in (ValueError, TemplateError):  # errors of a request, to which the server answers with status 500
        app.add_exception_handler(kind, refuse)
    serving = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10))
    served.stopping = lambda: serving.should_exit
    return serving
