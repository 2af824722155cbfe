"""lm-evaluation-harness on routed models, with what they cost beside the score.

    python -m ease.lm_eval --model ease --model_args pretrained=DIR,routing_threshold=0.9 --tasks ...

- This registers the model "ease" and hands over to the harness's own command line; every other option is its.
- Log-likelihoods come from `ease.score`, so padding is never run and no more logits exist than a chunk of tokens has.
- Generation is that of `EaseForCausalLM`, with its cache: each token is read once, and counted once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from ease.devices import choose_device
from ease.errors import EaseError, exit_on_error, require
from ease.evaluation.scoring import score
from ease.flops import classifier_flops, exit_flops, layer_flops, real_pairs
from ease.interface import IGNORE, Batch, Layout
from ease.routing.confidence import measure_named

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm  # type: ignore[import-untyped]

    from ease.hf.model import EaseForCausalLM
except ImportError:
    with exit_on_error() if __name__ == "__main__" else nullcontext():
        require("lm_eval.models.huggingface", "eval")
    raise

Request = tuple[Any, list[int], list[int]]  # what was asked in words, the context's ids, the continuation's ids

MADE: list[EaseLM] = []


@register_model("ease")
class EaseLM(HFLM):  # type: ignore[misc]
    """A model of ease for the harness.

    Args:
        pretrained: a folder or hub name that `EaseForCausalLM.from_pretrained` reads.
        routing_threshold: confidence at which a token leaves; the model's own policy by default, 0 for no routing.
        exits: layers after which it may leave, several as "4+8"; the model's own by default.
        dtype: of the weights, such as "bfloat16"; as they are stored by default.
        device: where the model runs; the GPU by default, if there is one.
        options: the further ones of the harness's `hf` model.
    """

    def __init__(
        self,
        pretrained: str,
        routing_threshold: float | str | Sequence[float] | None = None,
        exits: int | str | Sequence[int] | None = None,
        dtype: str = "auto",
        device: str | None = None,
        **options: Any,
    ) -> None:
        if not torch.cuda.is_available() and (device is None or device.startswith("cuda")):
            device = "cpu"  # the harness asks for cuda where nobody said anything
        if exits is not None and routing_threshold is None:
            raise EaseError("exits are for routing: give routing_threshold beside them, or leave them out")
        device = choose_device(device or "cuda")
        model = EaseForCausalLM.from_pretrained(pretrained, dtype=dtype)
        model.to(device)  # type: ignore[arg-type]
        if routing_threshold is not None:
            try:
                layers = [int(layer) for layer in exits.split("+")] if isinstance(exits, str) else exits
                threshold = float(routing_threshold) if isinstance(routing_threshold, str) else routing_threshold
            except ValueError:
                raise EaseError(
                    f"routing_threshold is a number and exits are layers, such as 4+8: got {routing_threshold}, {exits}"
                ) from None
            model.set_routing(threshold, layers)
        super().__init__(model, backend="causal", tokenizer=pretrained, **options)
        self.flops, self.processed, self.predicted, self.layers = 0.0, 0, 0, 0
        MADE.append(self)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Per request the log-likelihood of its continuation, and whether greedy decoding would write it."""
        size = override_bs or (self._detect_batch_size() if self.batch_size == "auto" else self.batch_size)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        batches = [[requests[i] for i in order[k : k + size]] for k in range(0, len(order), size)]
        model = self.model.model
        scores = score(
            model, tqdm(map(self.batch, batches), total=len(batches), disable=disable_tqdm), self.model.policy
        )
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

    def batch(self, requests: Sequence[Request]) -> Batch:
        """The requests as padded rows, in which only continuations are scored."""
        width = max(len(context) + len(continuation) for _, context, continuation in requests) - 1
        width = min(width, self.max_length)
        x = torch.zeros(len(requests), width, dtype=torch.long)
        y, mask = torch.full_like(x, IGNORE), torch.zeros_like(x)
        for row, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise EaseError(
                    f"a continuation of {len(continuation)} tokens does not fit: it must have 1 to {self.max_length} "
                    "(max_length), so change the task or max_length"
                )
            ids = torch.tensor((context + continuation)[-(width + 1) :])
            x[row, : len(ids) - 1], mask[row, : len(ids) - 1] = ids[:-1], 1
            y[row, len(ids) - 1 - len(continuation) : len(ids) - 1] = ids[-len(continuation) :]
        return Batch(x, y, layout=Layout.from_attention_mask(mask))

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        hooks = (
            self.model.register_forward_pre_hook(self.note, with_kwargs=True),
            self.model.register_forward_hook(self.count),
        )
        try:
            return super()._model_generate(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    def note(self, model: EaseForCausalLM, args: Any, kwargs: dict[str, Any]) -> None:
        """Notes what a step finds read: columns of the batch, and keys and values per layer and row."""
        cache = kwargs["past_key_values"]
        self.before = (0, 0) if cache is None else (cache.get_seq_length(), cache.native.filled.copy())

    def count(self, model: EaseForCausalLM, args: Any, output: Any) -> None:
        """Adds up what one step of generation cost; a row that has ended still waits, and costs, with its batch."""
        cache, (columns, filled) = output.past_key_values, self.before
        real = cache.real.long()
        layout = Layout((real.cumsum(1) - 1)[:, columns:], real[:, columns:] - 1)
        config, last, policy = model.model.config, model.model.num_layers, model.policy
        exits = layout.real * last if output.exits is None else output.exits
        # Keys and values count where they are made: for a token that left, when a later one of its row goes deeper.
        # Without a cache all tokens of a batch make them in every layer that one of them runs.
        for layer, made in enumerate((cache.native.filled - filled).sum(1).tolist(), start=1):
            arrived = exits >= layer
            self.flops += layer_flops(config, made, int(arrived.sum()), real_pairs(arrived, layout))
        for layer in policy.exits:
            # Every token is asked at every exit, by some measures without the head until it leaves.
            asked = exits >= layer if measure_named(policy.confidence).needs_head else exits == layer
            self.flops += exit_flops(config, int(asked.sum()), layer)
            if policy.confidence == "classifier":
                self.flops += classifier_flops(config, int((exits >= layer).sum()))
        # At the end only the one whose successor is wanted is asked, the last of its row.
        self.flops += exit_flops(config, int((exits[:, -1] == last).sum()), last)
        self.processed += int(layout.real.sum())
        self.predicted += len(exits)
        self.layers += int(exits[:, -1].sum())

    @property
    def compute(self) -> dict[str, float]:
        """FLOPs per token that ran, every head included, and the share of the layers that predicted tokens ran."""
        return {
            "flops_per_token": self.flops / max(1, self.processed),
            "layers_run": self.layers / max(1, self.predicted) / self.model.model.num_layers,
            "tokens_run": self.processed,
            "tokens_predicted": self.predicted,
        }

    def get_model_info(self) -> dict[str, Any]:
        """Goes into the harness's results, under `config`."""
        policy = self.model.policy
        routing = {"exits": policy.exits, "thresholds": policy.thresholds}
        return {**super().get_model_info(), "routing": routing, "compute": self.compute}


def main() -> int:
    """The harness's command line; bad input of ease is one sentence on stderr and exit code 2."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except EaseError as error:
        print(f"ease: {error}", file=sys.stderr)
        return 2
    for lm in MADE:
        compute, policy = lm.compute, lm.model.policy
        routed = f"exits {policy.exits} at {policy.thresholds}" if policy.exits else "no routing"
        print(
            f"compute ({routed}): {compute['flops_per_token']:,.0f} FLOPs per token, heads included; predicted tokens "
            f"ran {compute['layers_run']:.1%} of the layers"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
