"""lm-evaluation-harness on routed models, with the compute next to the score.

    python -m ease.hf.lm_eval --model ease --model_args pretrained=DIR,routing_threshold=0.9 --tasks ...

- This registers the model "ease" and runs the harness's own command line; all other options belong to the harness.
- Log-likelihoods come from `ease.score`: padding is never computed, and logits exist for one chunk of tokens at a time.
- Generation is that of `EaseForCausalLM` with its cache: each token is read once, and counted once.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ease.devices import choose_device, choose_dtype
from ease.errors import EaseError, check_boolean, check_choice, check_integer, exit_on_error, first_line, require
from ease.evaluation.scoring import score
from ease.flops import exit_flops, layer_flops, real_pairs
from ease.hf.options import read_options
from ease.interface import IGNORE, Batch, Layout
from ease.routing.confidence import measure_named
from ease.runs.reopen import export

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm  # type: ignore[import-untyped]

    from ease.hf.adapters import merge_adapter
    from ease.hf.model import EaseForCausalLM
except ImportError:
    with exit_on_error() if __name__ == "__main__" else nullcontext():
        require("lm_eval.models.huggingface", "eval")
    raise

Request = tuple[Any, list[int], list[int]]  # cache key, ids of the context, ids of the continuation

# Options that the harness follows by itself, with what this class gives it.
FOLLOWED = (
    *("batch_size", "max_batch_size", "max_length", "mixed_precision_dtype", "truncation", "prefix_token_id"),
    *("add_bos_token", "use_fast_tokenizer", "think_end_token", "enable_thinking", "chat_template_args"),
)

CREATED: list[EaseLM] = []  # models whose compute `main` prints, since the harness's command line does not return them


@register_model("ease")
class EaseLM(HFLM):  # type: ignore[misc]
    """A model of ease under lm-evaluation-harness.

    Every option of the harness's `hf` model has the same effect here, or is refused by name.

    Args:
        pretrained: a folder or hub name that `EaseForCausalLM.from_pretrained` reads, a run folder, or such a model.
        routing_threshold: confidence at which a token leaves, 0 for full depth; the model's own policy by default.
        exits: layers after which tokens may leave, several as "4+8"; by default those of the model's policy.
        device: device of the model; by default the GPU if there is one.
        tokenizer: a folder, a hub name, or a tokenizer of transformers; by default that of `pretrained`.
        peft: an adapter of the model or of its stock form, a folder or a hub name, which is merged into the weights.
        backend: "causal", the only kind of model here.
        softmax_dtype: dtype of probabilities, which is float32, or that of the weights where it is wider.
        logits_cache: False, since every request is scored by itself.
        options: `batch_size`, `max_batch_size`, `max_length`, `mixed_precision_dtype` and the options for prompts and
            tokenizers (`FOLLOWED`), as in the harness; or options of `EaseForCausalLM.from_pretrained`, such as `dtype`
            and `revision`.

    Attributes:
        flops: FLOPs spent so far.
        processed: tokens that ran, padding excluded.
        predicted: tokens that were predicted.
        layers: layers that the predicted tokens ran, in total.

    Raises:
        EaseError: an option is not valid, or the checkpoint cannot be read.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | EaseForCausalLM,
        routing_threshold: float | str | Sequence[float] | None = None,
        exits: int | str | Sequence[int] | None = None,
        *,
        device: str | None = None,
        tokenizer: Any = None,
        peft: str | None = None,
        backend: str = "causal",
        softmax_dtype: str | torch.dtype | None = None,
        logits_cache: bool = False,
        **options: Any,
    ) -> None:
        check_choice("backend", backend, ("default", "causal"))
        if logits_cache:
            raise EaseError("logits_cache is not an option that ease supports: leave it out")
        if exits is not None and routing_threshold is None:
            raise EaseError("exits need a routing_threshold: give both, or neither")
        if device is None and options.get("device_map") is None:
            device = "cuda"
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"  # the harness passes cuda by default
        followed = {name: options.pop(name) for name in FOLLOWED if options.get(name) is not None}
        _check_options(followed)
        reading = {name: followed.pop(name) for name in ("use_fast_tokenizer", "add_bos_token") if name in followed}
        if isinstance(pretrained, EaseForCausalLM):
            given = {**options, "peft": peft}
            if refused := [name for name, value in given.items() if value is not None]:
                raise EaseError(
                    f"{', '.join(refused)} is for a folder or a name, and pretrained is a model: leave it out"
                )
            if tokenizer is None:
                raise EaseError("pretrained is a model in memory, which has no tokenizer: give tokenizer as well")
            model = pretrained.to(choose_device(device or "cpu"))  # type: ignore[arg-type]
            self._read_tokenizer(tokenizer, **reading)
        else:
            with _checkpoint(pretrained, {**options, "device": device}) as (folder, rest):
                model = EaseForCausalLM.from_pretrained(folder, **rest)
                self._read_tokenizer(folder if tokenizer is None else tokenizer, **reading)
            if peft is not None:
                model = merge_adapter(model, peft, revision=options.get("revision"), vocab_size=len(self.tokenizer))
        wide = torch.promote_types(model.dtype, torch.float32)
        if _dtype("softmax_dtype", softmax_dtype) not in (None, wide):
            raise EaseError(
                f"softmax_dtype {softmax_dtype} is not an option that ease supports: leave it out, for {wide}"
            )
        if routing_threshold is not None:
            try:
                layers = [int(layer) for layer in exits.split("+")] if isinstance(exits, str) else exits
                threshold = float(routing_threshold) if isinstance(routing_threshold, str) else routing_threshold
            except ValueError:
                raise EaseError(
                    f"routing_threshold must be a number and exits layers such as 4+8, got {routing_threshold} and "
                    f"{exits}"
                ) from None
            model.set_routing(threshold, layers)
        try:
            super().__init__(model, backend="causal", tokenizer=self.tokenizer, peft=peft, **followed)
        except ValueError as error:  # options that the harness does not take together
            raise EaseError(f"lm-evaluation-harness refuses these options: {first_line(error)}") from error
        if self.prefix_token_id is None:
            raise EaseError(
                "the tokenizer names neither a bos nor an eos token, one of which the harness puts before a text: give "
                "prefix_token_id, or name them in tokenizer_config.json"
            )
        # What the harness records with its results.
        self.pretrained = "" if isinstance(pretrained, EaseForCausalLM) else os.fspath(pretrained)
        self.revision = options.get("revision") or "main"
        self.flops = 0.0
        self.processed = 0
        self.predicted = 0
        self.layers = 0
        CREATED.append(self)

    def _read_tokenizer(self, tokenizer: Any, **options: Any) -> None:
        """Reads the tokenizer as the harness does. No code of a checkpoint is run."""
        try:
            self._create_tokenizer("", os.fspath(tokenizer) if isinstance(tokenizer, Path) else tokenizer, **options)
        except Exception as error:  # for a file that is missing or damaged, the library raises many kinds of errors
            raise EaseError(
                f"the tokenizer {tokenizer} cannot be read ({first_line(error)}): give a folder or a name on the "
                "Hugging Face hub as tokenizer"
            ) from error

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each request the log-likelihood of its continuation, and whether greedy decoding gives it."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        batches = self._batches([requests[i] for i in order], override_bs)
        progress = tqdm(map(self.batch, batches), total=len(batches), disable=disable_tqdm)
        mixed = self.mixed_precision_dtype
        with torch.autocast(self.device.type, mixed, enabled=mixed is not None):
            scores = score(self.model.model, progress, self.model.policy)
        self.flops += scores.flops
        self.processed += scores.processed
        self.predicted += len(scores.exits)
        self.layers += int(scores.exits.sum())
        lengths = [len(requests[i][2]) for i in order]
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for i, losses, correct in zip(order, scores.losses.split(lengths), scores.correct.split(lengths), strict=True):
            answers[i] = (-losses.sum().item(), bool(correct.all()))
            if requests[i][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return answers

    def _batches(self, requests: list[Request], size: int | None) -> list[list[Request]]:
        """The requests, from long to short, in batches; with "auto:N", the size is measured N times on the way."""
        self.batch_sizes: dict[int, int] = {}
        self.batch_schedule: float = min(self.batch_schedule, max(1, len(requests)))
        batches: list[list[Request]] = []
        start = 0
        while start < len(requests):
            auto = self.batch_size == "auto"
            rows = size or (self._batch_scheduler(start, requests) if auto else self.batch_size)
            batches.append(requests[start : start + rows])
            start += rows
        return batches

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The harness's answers to requests for text."""
        try:
            answers: list[str] = super().generate_until(requests, disable_tqdm)
        except AssertionError as error:  # more new tokens than positions
            raise EaseError(f"lm-evaluation-harness refuses a request for text: {first_line(error)}") from error
        return answers

    def batch(self, requests: Sequence[Request]) -> Batch:
        """A batch of requests as rows padded on the right, in which only continuations are scored."""
        width = max(len(context) + len(continuation) for _, context, continuation in requests) - 1
        width = min(width, self.max_length)
        x = torch.zeros(len(requests), width, dtype=torch.long)
        y, mask = torch.full_like(x, IGNORE), torch.zeros_like(x)
        for row, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise EaseError(
                    f"a continuation must have 1 to {self.max_length} tokens (max_length), got {len(continuation)}: "
                    "change the task or max_length"
                )
            ids = torch.tensor((context + continuation)[-(width + 1) :])
            x[row, : len(ids) - 1] = ids[:-1]
            mask[row, : len(ids) - 1] = 1
            y[row, len(ids) - 1 - len(continuation) : len(ids) - 1] = ids[-len(continuation) :]
        return Batch(x, y, layout=Layout.from_attention_mask(mask))

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        hooks = (
            self.model.register_forward_pre_hook(self._before_step, with_kwargs=True),
            self.model.register_forward_hook(self._after_step),
        )
        try:
            return super()._model_generate(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    def _before_step(self, model: EaseForCausalLM, args: Any, kwargs: dict[str, Any]) -> None:
        """Records the cache before a step of generation: columns read, and keys and values per layer and row."""
        cache = kwargs["past_key_values"]
        self._cached = (0, 0) if cache is None else (cache.get_seq_length(), cache.native.filled.copy())

    def _after_step(self, model: EaseForCausalLM, args: Any, output: Any) -> None:
        """Adds the FLOPs of a step of generation. A row that has ended stays in its batch, and still costs."""
        cache, (columns, filled) = output.past_key_values, self._cached
        config, last, policy = model.model.config, model.model.num_layers, model.policy
        measure = measure_named(policy.confidence)
        real = cache.real.long()
        layout = Layout((real.cumsum(1) - 1)[:, columns:], real[:, columns:] - 1)
        exits = layout.real * last if output.exits is None else output.exits.cpu()
        # Keys and values count where they are computed: for a token that left, when a later token of its row goes
        # deeper. Without a cache all tokens of a batch compute them in every layer that one of them runs.
        for layer, num_keys in enumerate((cache.native.filled - filled).sum(1).tolist(), start=1):
            arrived = exits >= layer
            self.flops += layer_flops(config, num_keys, int(arrived.sum()), real_pairs(arrived, layout))
        for layer in policy.exits:
            arrived = exits >= layer
            # An exit evaluates every token that arrives, some measures without the head unless the token leaves.
            heads = arrived if measure.needs_head else exits == layer
            self.flops += exit_flops(config, int(heads.sum()), layer)
            self.flops += measure.flops(config, int(arrived.sum()))
        # The last exit evaluates only the last token of a row, whose successor is sampled.
        self.flops += exit_flops(config, int((exits[:, -1] == last).sum()), last)
        self.processed += int(layout.real.sum())
        self.predicted += len(exits)
        self.layers += int(exits[:, -1].sum())

    @property
    def compute(self) -> dict[str, float]:
        """What the requests so far cost.

        "flops_per_token" is per token that ran, with all heads; "layers_run" is the mean share of the layers that the
        predicted tokens ran.
        """
        return {
            "flops_per_token": self.flops / max(1, self.processed),
            "layers_run": self.layers / max(1, self.predicted) / max(1, self.model.model.num_layers),
            "tokens_run": self.processed,
            "tokens_predicted": self.predicted,
        }

    def get_model_info(self) -> dict[str, Any]:
        """Adds routing and compute to the "config" of the harness's results."""
        policy = self.model.policy
        routing = {"exits": policy.exits, "thresholds": policy.thresholds}
        return {**super().get_model_info(), "routing": routing, "compute": self.compute}


def _check_options(options: dict[str, Any]) -> None:
    """Refuses values of the harness's options that are of the wrong type or have no effect."""
    for name in ("max_length", "max_batch_size"):
        if name in options:
            check_integer(name, options[name], 1)
    for name in ("truncation", "use_fast_tokenizer", "add_bos_token", "enable_thinking"):
        if name in options:
            check_boolean(name, options[name])
    _dtype("mixed_precision_dtype", options.get("mixed_precision_dtype"))
    if not re.fullmatch(r"auto(:[1-9]\d*)?|[1-9]\d*", str(options.get("batch_size", 1))):
        raise EaseError(f'batch_size must be a number, "auto" or "auto:N", got {options["batch_size"]!r}')


def _dtype(name: str, value: Any) -> torch.dtype | None:
    """The dtype that an option names."""
    try:
        return choose_dtype(value)
    except EaseError as error:
        raise EaseError(f"{name}: {error}") from error


@contextmanager
def _checkpoint(name: str | os.PathLike[str], options: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The local folder of a checkpoint, and the options that remain; a run is exported to a temporary folder."""
    folder, dtype, device = read_options(name, options)
    with TemporaryDirectory() as temporary:
        if (folder / "summary.json").is_file():
            export(folder, Path(temporary) / folder.name)
            folder = Path(temporary) / folder.name
        yield folder, {"dtype": dtype, "device": device}


def main() -> int:
    """Runs the harness's command line; prints an EaseError to stderr and returns 2."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except EaseError as error:
        print(f"ease: {error}", file=sys.stderr)
        return 2
    for lm in CREATED:
        compute, policy = lm.compute, lm.model.policy
        routed = f"exits {policy.exits} at {policy.thresholds}" if policy.exits else "no routing"
        print(
            f"compute ({routed}): {compute['flops_per_token']:,.0f} FLOPs per token, heads included; predicted tokens "
            f"ran {compute['layers_run']:.1%} of the layers"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
