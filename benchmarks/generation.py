"""Speed of every way to decode, compared in one process, and what limits it.

    python benchmarks/generation.py RUN [--new-tokens 128] [--batch 1 8] [--rounds 5] [--out results/decoding.json]

RUN is the folder of a run whose model has trained exits and a policy, for example one written by `ease tune` with
thresholds from `ease calibrate`. Decoding is greedy, on the same weights and prompts (held-out text of the run), with
interleaved calls (A B C A B C ...); times are wall-clock, ratios are the median over rounds with their range. Tables:

- the ways to decode, including transformers' `generate` on the exported weights and its `assistant_early_exit`, which
  drafts through the final norm for a single row; ease is measured with the final norm at the exit as well;
- routed decoding against its roofline: the sum of its layers, heads and steps, each timed alone;
- routed prefill against the speed-up of its counted FLOPs;
- the time per token by the number of exits evaluated and not taken;
- the time per token early and late in a long text.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ease
from ease.devices import choose_device, machine
from ease.evaluation.decoding_speed import in_turns, side_by_side, ways
from ease.models import StandardTransformer
from ease.routing.forward import routed_forward
from ease.runs.reopen import open_run

PROMPT = 64
PREFILL = 1024

Call = Callable[[], Any]


def least_seconds(
    calls: Mapping[Any, Call], rounds: int, clock: Callable[[Any], float] | None = None
) -> dict[Any, float]:
    """The shortest time of each call over interleaved rounds; `clock` as in `in_turns`."""
    seconds, _ = in_turns(calls, rounds, clock=clock)
    return {name: min(times) for name, times in seconds.items()}


def without_prefill(answer: ease.Generation) -> float:
    """Seconds of decoding, without prefill."""
    return float(answer.stats["seconds"] - answer.stats["prefill_seconds"])


def with_policy(model: StandardTransformer, exits: tuple[int, ...], thresholds: tuple[float, ...]) -> Any:
    """The same weights under another policy."""
    other = copy.copy(model)
    other.policy = ease.Policy(exits, thresholds)
    return other


def with_final_norm(model: StandardTransformer, exit: int) -> StandardTransformer:
    """The model with the final norm at an exit and no adapter, as in a checkpoint without tuned exits."""
    other = copy.deepcopy(model)
    other.exit_norms[exit - 1] = copy.deepcopy(other.exit_norms[-1])
    if str(exit) in other.exit_adapters:
        del other.exit_adapters[str(exit)]
    return other


def transformers_calls(model: StandardTransformer, prompts: torch.Tensor, steps: int) -> dict[str, Call]:
    """transformers on the exported weights, and ease with drafts through the final norm as in transformers."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        ease.save_pretrained(model, Path(folder) / "export")
        stock = AutoModelForCausalLM.from_pretrained(Path(folder) / "export").to(prompts.device).eval()
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompts)

    def generate(**more: Any) -> torch.Tensor:
        found: torch.Tensor = stock.generate(prompts, attention_mask=mask, **options, **more)
        return found[:, prompts.shape[1] :]

    calls: dict[str, Call] = {"transformers, full": generate}
    for exit in model.policy.exits:
        if len(prompts) == 1:  # assisted generation takes one row
            calls[f"transformers, assistant_early_exit={exit}"] = partial(generate, assistant_early_exit=exit)
        untuned = with_final_norm(model, exit)
        name = f"exact, exit {exit} through the final norm"
        calls[name] = partial(ease.generate, untuned, prompts, steps, "exact", draft_exit=exit)
    return calls


def truncated(model: StandardTransformer, layers: int) -> StandardTransformer:
    """The first layers and the head."""
    options = {k: v for k, v in vars(model.config).items() if not k.startswith(("adapter", "classifier"))}
    made = StandardTransformer(**options | {"num_layers": layers}).to(model.embedding.weight).eval()
    made.load_state_dict(model.state_dict(), strict=False)
    return made


@torch.no_grad()
def roofline(model: StandardTransformer, prompts: torch.Tensor, steps: int, rounds: int) -> dict[str, Any]:
    """Routed decoding against the sum of its parts, each timed alone at its number of rows.

    The time of a layer at n rows is the difference between full decoding with all layers and with half of them; the
    rest of full decoding (embedding, last head, choice of the token) belongs to every step. A layer runs for the rows
    that reach it, and the head of every exit is evaluated for the rows that reach the exit.
    """
    L, rows, cut = model.num_layers, range(1, len(prompts) + 1), model.num_layers // 2
    exits, half, state = model.policy.exits, truncated(model, cut), model.embedding(prompts[:, 0])
    calls: dict[Any, Call] = {"routed": partial(ease.generate, model, prompts, steps, "routed")}
    for n in rows:
        calls["all", n] = partial(ease.generate, model, prompts[:n], steps)
        calls["half", n] = partial(ease.generate, half, prompts[:n], steps)
    took = least_seconds(calls, rounds, without_prefill)

    def evaluate_exit(n: int) -> None:
        for _ in range(50):
            model.logits(state[:n], exits[0]).softmax(-1).amax(-1)

    head = {n: t / 50 for n, t in least_seconds({n: partial(evaluate_exit, n) for n in rows}, rounds).items()}
    layer = {n: (took["all", n] - took["half", n]) / (steps - 1) / (L - cut) for n in rows}
    layer[0], head[0] = 0.0, 0.0
    full = took["all", len(prompts)]
    rest, chosen = full - (steps - 1) * L * layer[len(prompts)], calls["routed"]().exits[:, 1:]
    running = [[int((column >= k).sum()) for k in range(1, L + 1)] for column in chosen.T]
    allowed = rest + sum(sum(layer[n] for n in step) + sum(head[step[e - 1]] for e in exits) for step in running)
    return {
        "batch": len(prompts),
        "exit": chosen.double().mean().item(),
        "head": head[len(prompts)] / layer[len(prompts)],
        "allowed": full / allowed,
        "reached": full / took["routed"],
        "share": allowed / took["routed"],
    }


@torch.no_grad()
def prefill(model: StandardTransformer, ids: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Prefill of one long prompt (1, T), half of whose tokens leave at the first exit, against its counted FLOPs."""
    exit, last = model.policy.exits[0], torch.zeros_like(ids, dtype=torch.bool)
    last[:, -1] = True
    confidence = ease.compute_confidence(model, model.forward_to_layer(ids, exit), exit)
    routed = with_policy(model, (exit,), (confidence.median().item(),))
    flops = {}
    for name, policy in (("full", ease.Policy()), ("routed", routed.policy)):
        flops[name] = sum(step.flops for step in routed_forward(model, ids, policy, required=last))
    calls = {"full": partial(ease.generate, model, ids, 1), "routed": partial(ease.generate, routed, ids, 1, "routed")}
    took = least_seconds(calls, rounds, lambda answer: answer.stats["prefill_seconds"])
    promised, reached = flops["full"] / flops["routed"], took["full"] / took["routed"]
    return {"tokens": ids.shape[1], "exit": exit, "promised": promised, "reached": reached, "share": reached / promised}


def exits_not_taken(model: StandardTransformer, prompts: torch.Tensor, steps: int, rounds: int) -> list[dict[str, Any]]:
    """The time of a step by the number of exits evaluated and not taken."""
    L, calls = model.num_layers, {}
    for count in (1, 2, 3, L // 2, L - 1):
        other = with_policy(model, tuple(range(1, count + 1)), (math.inf,) * count)
        calls[count] = partial(ease.generate, other, prompts, steps, "routed")
    took = least_seconds({0: partial(ease.generate, model, prompts, steps)} | calls, rounds, without_prefill)
    return [{"exits": n, "ms": 1e3 * t / (steps - 1), "ratio": t / took[0]} for n, t in took.items()]


def by_length(model: StandardTransformer, prompts: torch.Tensor, steps: int, rounds: int) -> list[dict[str, Any]]:
    """The time per token early and late in a long text."""
    rows = []
    for mode in ("full", "routed", "exact"):
        early, late = [], []
        for _ in range(rounds):
            at: list[float] = []
            ease.generate(model, prompts[:1], steps, mode, stream=lambda token, at=at: at.append(time.perf_counter()))
            early.append((at[steps // 8] - at[0]) / (steps // 8))
            late.append((at[-1] - at[-1 - steps // 8]) / (steps // 8))
        rows.append({"mode": mode, "tokens": steps, "early": 1e3 * min(early), "late": 1e3 * min(late)})
    return rows


def print_table(rows: list[dict[str, Any]], columns: Mapping[str, Callable[[dict[str, Any]], str]]) -> None:
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(show(row) for show in columns.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    model, _, corpus, _ = open_run(args.run)
    model.to(device)
    if not model.policy.exits:
        raise SystemExit(f"{args.run} has no policy: give its exits thresholds with ease calibrate")
    prompts = next(iter(ease.TokenBatches(corpus.test, PROMPT, max(args.batch))))[0].to(device)
    long = corpus.test[:PREFILL].long()[None].to(device)
    steps, found = args.new_tokens, {"machine": machine(device), "policy": vars(model.policy)}
    found["ways"] = [
        row
        for batch in args.batch
        for row in side_by_side(
            ways(model, prompts[:batch], steps) | transformers_calls(model, prompts[:batch], steps), args.rounds
        )
    ]
    print_table(
        found["ways"],
        {
            "way": lambda r: r["way"] + (f" ({r['draft_source']})" if r["way"] == "exact, auto" else ""),
            "batch": lambda r: str(r["batch"]),
            "tokens/s": lambda r: f"{r['tokens_per_second']:.0f}",
            "times full (range)": lambda r: f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})",
            "same tokens": lambda r: f"{r['same_tokens']:.1%}",
            "layers per token": lambda r: "" if r["layers_per_token"] is None else f"{r['layers_per_token']:.1f}",
            "drafts accepted": lambda r: "" if r["acceptance"] is None else f"{r['acceptance']:.0%}",
        },
    )
    exits = model.policy.exits
    with torch.no_grad():
        medians = [ease.compute_confidence(model, model.forward_to_layer(prompts, e), e).median().item() for e in exits]
    policies = {"its own": model, "half leave at each exit": with_policy(model, exits, tuple(medians))}
    found["roofline"] = [
        {"policy": name, **roofline(routed, prompts[:batch], steps, args.rounds)}
        for name, routed in policies.items()
        for batch in args.batch
    ]
    print_table(
        found["roofline"],
        {
            "policy": lambda r: r["policy"],
            "batch": lambda r: str(r["batch"]),
            "mean exit": lambda r: f"{r['exit']:.1f}",
            "a head, in layers": lambda r: f"{r['head']:.2f}",
            "allowed": lambda r: f"{r['allowed']:.2f}",
            "reached": lambda r: f"{r['reached']:.2f}",
            "share": lambda r: f"{r['share']:.2f}",
        },
    )
    found["prefill"] = [prefill(model, long, args.rounds)]
    print_table(
        found["prefill"],
        {
            "prompt, half of its tokens leave": lambda r: f"{r['tokens']} tokens, exit {r['exit']}",
            "promised by FLOPs": lambda r: f"{r['promised']:.2f}",
            "reached": lambda r: f"{r['reached']:.2f}",
            "share": lambda r: f"{r['share']:.2f}",
        },
    )
    found["exits"] = exits_not_taken(model, prompts[:1], steps, args.rounds)
    print_table(
        found["exits"],
        {
            "exits evaluated, none taken": lambda r: str(r["exits"]),
            "ms per token": lambda r: f"{r['ms']:.2f}",
            "times full": lambda r: f"{r['ratio']:.2f}",
        },
    )
    found["length"] = by_length(model, prompts, 4 * steps, args.rounds)
    print_table(
        found["length"],
        {
            "mode": lambda r: f"{r['mode']}, {r['tokens']} tokens",
            "ms per token, first eighth": lambda r: f"{r['early']:.2f}",
            "last eighth": lambda r: f"{r['late']:.2f}",
        },
    )
    about = found["machine"]
    print(
        f"\n{about['cpu']}, {about['threads']} thread(s), {about['device']}, torch {about['torch']}; "
        f"vocabulary {corpus.vocab_size}"
    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
