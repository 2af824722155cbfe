"""Speed of every way to decode, compared in one process, and what limits it.

    python benchmarks/generation.py MODEL [--text FILE ...] [--new-tokens 128] [--batch 1 8] [--prompts 16] [--out FILE]

MODEL is the folder of a run, whose held-out text gives the prompts, or a checkpoint, whose prompts come from the files
of `--text`, taken in turns. Decoding is greedy, on the same weights and prompts, with interleaved calls (A B C A B C
...); times are wall-clock without the prompt. Tables:

- what a pass over n tokens a row costs, v_B(n): every estimate of speculative decoding needs it;
- the ways to decode, including transformers' `generate` on the exported weights, its `assistant_early_exit` and its
  `prompt_lookup_num_tokens`; each batch of prompts is a round, ratios are the median over rounds with their range;
- the same for one row, apart for continuations that repeat themselves, and sampled texts;
- for a model with a policy, routed decoding against its roofline (the sum of its layers, heads and steps, each timed
  alone), routed prefill against the speed-up of its counted FLOPs, and the time per token by the number of exits
  evaluated and not taken;
- the time per token early and late in a long text.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ease
from ease.devices import choose_device, machine
from ease.evaluation.decoding_speed import in_turns, ways
from ease.models import StandardTransformer
from ease.routing.forward import routed_forward
from ease.runs.reopen import count_table, load_start, open_run

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


def transformers_calls(model: StandardTransformer, steps: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Ways of transformers to continue prompts (B, T) by exactly `steps` tokens, on the exported weights."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        ease.save_pretrained(model, Path(folder) / "export")
        stock = AutoModelForCausalLM.from_pretrained(Path(folder) / "export").to(model.embedding.weight.device).eval()
    stock.generation_config.eos_token_id = None

    def generate(prompts: torch.Tensor, **more: Any) -> torch.Tensor:
        options = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
        found: torch.Tensor = stock.generate(prompts, attention_mask=torch.ones_like(prompts), **options, **more)
        return found[:, prompts.shape[1] :]

    calls = {"transformers, full": generate}
    calls["transformers, prompt_lookup_num_tokens=8"] = partial(generate, prompt_lookup_num_tokens=8)
    for exit in model.policy.exits or model.early_exits:
        calls[f"transformers, assistant_early_exit={exit}"] = partial(generate, assistant_early_exit=exit)
    return calls


@torch.no_grad()
def pass_costs(model: StandardTransformer, rows: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds of a pass over n tokens a row after PROMPT tokens, with the head and the choice of a token for each.

    `same`: all rows stand at the same place; `apart`: each row has three tokens less than the one before it.
    """
    view, counts, last = model.decoding_view(), (1, 2, 4, 8, 16), model.num_layers
    ids = torch.randint(model.config.vocab_size, (rows, PROMPT), device=model.embedding.weight.device)
    lengths = {"same": torch.full((rows,), PROMPT), "apart": PROMPT - 3 * torch.arange(rows)}
    caches, calls = {}, dict[Any, Call]()
    for name, length in lengths.items():
        real = torch.arange(PROMPT) < length[:, None]
        caches[name] = cache = view.new_cache(rows, PROMPT + max(counts))
        layout = ease.Layout(torch.zeros_like(real, dtype=torch.long), real.long() - 1)
        view.run(view.embed(ids), 1, last, layout=layout, cache=cache)

        def read(n: int, cache: Any = cache, length: torch.Tensor = length) -> float:
            cache.cut(length)
            begin = time.perf_counter()
            state = view.run(view.embed(ids[:, :n]), 1, last, cache=cache)
            view.logits(state.flatten(0, 1), last).argmax(-1).cpu()
            return time.perf_counter() - begin

        calls |= {(name, n): partial(read, n) for n in counts}
    seconds, _ = in_turns(calls, rounds, clock=float)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    step = median["same", 1]
    return [{"batch": rows, "ms": 1e3 * step, "n": n, **{k: median[k, n] / step for k in lengths}} for n in counts]


def compare(
    model: StandardTransformer, prompts: torch.Tensor, batch: int, steps: int, table: ease.CountTable | None
) -> list[dict[str, Any]]:
    """Every way to decode, one batch of prompts after another; each batch is a round with its own texts.

    A ratio of a way is the seconds of full decoding over its own, without the prompt; transformers' calls are timed
    whole, and full decoding as a whole is what they are compared with.
    """
    stock = transformers_calls(model, steps)
    if batch > 1:  # assisted generation takes one row
        stock = {"transformers, full": stock["transformers, full"]}

    def calls_for(part: torch.Tensor) -> dict[str, Call]:
        return ways(model, part, steps, table) | {name: partial(call, part) for name, call in stock.items()}

    found: dict[str, list[dict[str, Any]]] = {}
    parts = prompts.split(batch)
    for call in calls_for(parts[0]).values():  # the first calls allocate and are not counted
        call()
    for part in parts:
        for name, call in calls_for(part).items():
            begin = time.perf_counter()
            answer = call()
            whole, stats = time.perf_counter() - begin, getattr(answer, "stats", {})
            kept = {key: stats[key] for key in ("tokens_per_round", "acceptance", "draft_source") if key in stats}
            tokens = answer.tokens if stats else answer.cpu()
            decoding = stats["seconds"] - stats["prefill_seconds"] if stats else whole
            found.setdefault(name, []).append({"whole": whole, "decoding": decoding, "tokens": tokens, **kept})
    rows = []
    for name, rounds in found.items():
        clock = "whole" if name in stock else "decoding"
        ratios = [full[clock] / own[clock] for full, own in zip(found["full"], rounds, strict=True)]
        same = [bool(torch.equal(f["tokens"], o["tokens"])) for f, o in zip(found["full"], rounds, strict=True)]
        repeats = [repetition(full["tokens"]) for full in found["full"]]
        rows.append(
            {
                "way": name,
                "batch": batch,
                "tokens_per_second": sum(r["tokens"].numel() for r in rounds) / sum(r["whole"] for r in rounds),
                "ratio": statistics.median(ratios),
                "total": sum(f[clock] for f in found["full"]) / sum(r[clock] for r in rounds),
                "low": min(ratios),
                "high": max(ratios),
                "ratios": ratios,
                "repeats": repeats,
                "same_tokens": statistics.mean(same),
                "tokens_per_round": mean_of([r.get("tokens_per_round") for r in rounds]),
                "acceptance": mean_of([r.get("acceptance") for r in rounds]),
                "sources": sorted({r["draft_source"] for r in rounds if r.get("draft_source")}),
            }
        )
    return rows


def sampled(model: StandardTransformer, prompts: torch.Tensor, steps: int, temperature: float) -> dict[str, Any]:
    """Exact decoding with lookup against full decoding of one row after another, both drawing their tokens."""
    seconds, rounds = {"full": 0.0, "exact": 0.0}, []
    for seed, part in enumerate(prompts.split(1)):
        for mode, options in (("full", {}), ("exact", {"draft_source": "lookup"})):
            answer = ease.generate(model, part, steps, mode, temperature=temperature, seed=seed, **options)  # type: ignore[arg-type]
            seconds[mode] += answer.stats["seconds"] - answer.stats["prefill_seconds"]
            rounds += [answer.stats["tokens_per_round"]] if mode == "exact" else []
    ratio = seconds["full"] / seconds["exact"]
    return {"temperature": temperature, "texts": len(prompts), "ratio": ratio, "tokens_per_round": mean_of(rounds)}


def mean_of(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def repetition(tokens: torch.Tensor) -> float:
    """Share of the groups of four tokens of the rows (B, N) that occurred before in the same row."""
    shares = []
    for row in tokens.tolist():
        groups = [tuple(row[i : i + 4]) for i in range(len(row) - 3)]
        shares.append(1 - len(set(groups)) / len(groups))
    return statistics.mean(shares)


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
    for mode in ("full", "routed", "exact") if model.policy.exits else ("full", "exact"):
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
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="files with the prompts of a checkpoint")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    model, prompts, long, table = open_model(args.model, args.text, args.prompts)
    model.to(device)
    prompts, long, steps = prompts.to(device), long.to(device), args.new_tokens
    found: dict[str, Any] = {"machine": machine(device), "policy": vars(model.policy), "model": vars(model.config)}
    found["pass"] = [row for batch in args.batch for row in pass_costs(model, batch, 4 * args.rounds)]
    print_table(
        found["pass"],
        {
            "rows": lambda r: str(r["batch"]),
            "ms per step": lambda r: f"{r['ms']:.2f}",
            "tokens a row": lambda r: str(r["n"]),
            "steps, same place": lambda r: f"{r['same']:.2f}",
            "rows apart": lambda r: f"{r['apart']:.2f}",
        },
    )
    found["ways"] = [row for batch in args.batch for row in compare(model, prompts, batch, steps, table)]
    print_table(
        found["ways"],
        {
            "way": lambda r: r["way"] + (f" ({'; '.join(r['sources'])})" if r["way"] == "exact, auto" else ""),
            "batch": lambda r: str(r["batch"]),
            "tokens/s": lambda r: f"{r['tokens_per_second']:.1f}",
            "times full (range)": lambda r: f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})",
            "in total": lambda r: f"{r['total']:.2f}",
            "same texts": lambda r: f"{r['same_tokens']:.0%}",
            "tokens per pass": lambda r: "" if r["tokens_per_round"] is None else f"{r['tokens_per_round']:.2f}",
            "drafts accepted": lambda r: "" if r["acceptance"] is None else f"{r['acceptance']:.0%}",
        },
    )
    found["repetition"] = [
        {"way": row["way"], "texts": name, "count": len(part), "ratio": statistics.median(part)}
        for row in found["ways"]
        if row["batch"] == 1 and row["way"] != "full"
        for name, chosen in (("repeats itself", True), ("does not", False))
        if (part := [x for x, share in zip(row["ratios"], row["repeats"], strict=True) if (share > 0.5) is chosen])
    ]
    print_table(
        found["repetition"],
        {
            "way, one row": lambda r: r["way"],
            "full's continuation": lambda r: r["texts"],
            "texts": lambda r: str(r["count"]),
            "times full": lambda r: f"{r['ratio']:.2f}",
        },
    )
    found["sampled"] = [sampled(model, prompts, steps, temperature) for temperature in (0.8, 1.0)]
    print_table(
        found["sampled"],
        {
            "temperature, one row": lambda r: str(r["temperature"]),
            "texts": lambda r: str(r["texts"]),
            "exact, times full": lambda r: f"{r['ratio']:.2f}",
            "tokens per pass": lambda r: f"{r['tokens_per_round']:.2f}",
        },
    )
    if model.policy.exits:
        routed_tables(model, prompts, long, args, found)
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
        f"vocabulary {model.config.vocab_size}"
    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1, default=str) + "\n")


def open_model(
    name: str, texts: list[Path], prompts: int
) -> tuple[StandardTransformer, torch.Tensor, torch.Tensor, ease.CountTable | None]:
    """The model, prompts (P, PROMPT), one long prompt (1, PREFILL), and the counts of a run's training text."""
    if not texts:
        model, _, corpus, _ = open_run(Path(name))
        batch = next(iter(ease.TokenBatches(corpus.test, PROMPT, prompts)))
        return model, batch[0], corpus.test[:PREFILL].long()[None], count_table(Path(name))
    start = load_start(name)
    encoded = [start.tokenizer.encode(path.read_text()).ids for path in texts]
    for path, ids in zip(texts, encoded, strict=True):
        if len(ids) < prompts // len(texts) * 2 * PROMPT:
            raise SystemExit(f"{path} has {len(ids)} tokens, too few for {prompts} prompts: give a longer text")
    chosen = []
    for i in range(prompts):  # spread over each file
        ids, place = encoded[i % len(texts)], i // len(texts)
        at = (place + 1) * len(ids) // (prompts // len(texts) + 2)
        chosen.append(ids[at : at + PROMPT])
    long = torch.tensor(encoded[0] * (PREFILL // len(encoded[0]) + 1))[None, :PREFILL]
    return start.model, torch.tensor(chosen), long, None


def routed_tables(
    model: StandardTransformer, prompts: torch.Tensor, long: torch.Tensor, args: Any, found: dict[str, Any]
) -> None:
    """The tables of a model with a policy."""
    steps = args.new_tokens
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


if __name__ == "__main__":
    main()
