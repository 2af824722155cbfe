"""How fast each way to decode is, side by side in one process: ratios to this library's own full decoding.

    python benchmarks/generation.py RUN [--new-tokens 128] [--batch 1 8] [--repeats 5] [--out results/generation.json]

RUN is the folder of a run whose model has trained exits, say one that `ease tune` wrote. Greedy, all on the same
weights and prompts (held-out text of the run), calls in turn (A B C A B C ...), wall-clock, the median of the rounds'
ratios and their range. Beside ours stand transformers' own `generate` on the export, and its `assistant_early_exit`,
which drafts through the final norm on one row at a time; ours is shown with the final norm at the exit as well.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ease
from ease.finished import open_run
from ease.machine import choose_device, machine
from ease.models import StandardTransformer

PROMPT = 64

Call = Callable[[], Any]


def with_final_norm(model: StandardTransformer, exit: int) -> StandardTransformer:
    """The model whose exit is the last one's norm and head, as an untuned checkpoint has it."""
    plain = copy.deepcopy(model)
    plain.exit_norms[exit - 1] = copy.deepcopy(plain.exit_norms[-1])
    if str(exit) in plain.exit_adapters:
        del plain.exit_adapters[str(exit)]
    return plain


def ours(model: StandardTransformer, prompts: torch.Tensor, steps: int) -> dict[str, Call]:
    """The ways to decode that this library has."""
    exits = sorted(e for e in model.trained_exits if e < model.num_layers)
    calls: dict[str, Call] = {"full": lambda: ease.generate(model, prompts, steps)}
    if ease.Policy.own(model).exits:
        calls["routed, own policy"] = lambda: ease.generate(model, prompts, steps, "routed")
    calls["exact, auto"] = lambda: ease.generate(model, prompts, steps, "exact")
    for exit in exits:
        calls[f"exact, exit {exit}"] = lambda e=exit: ease.generate(model, prompts, steps, "exact", draft_exit=e)
        plain = with_final_norm(model, exit)
        calls[f"exact, exit {exit} through the final norm"] = lambda m=plain, e=exit: ease.generate(
            m, prompts, steps, "exact", draft_exit=e
        )
    return calls


def theirs(model: StandardTransformer, prompts: torch.Tensor, steps: int) -> dict[str, Call]:
    """transformers on the export of the same weights."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        ease.save_pretrained(model, Path(folder) / "export")
        stock = AutoModelForCausalLM.from_pretrained(Path(folder) / "export").to(prompts.device).eval()
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompts)
    calls: dict[str, Call] = {
        "transformers, full": lambda: stock.generate(prompts, attention_mask=mask, **options)[:, prompts.shape[1] :]
    }
    if len(prompts) == 1:  # assisted generation takes one row
        for exit in sorted(e for e in model.trained_exits if e < model.num_layers):
            calls[f"transformers, assistant_early_exit={exit}"] = lambda e=exit: stock.generate(
                prompts, attention_mask=mask, assistant_early_exit=e, **options
            )[:, prompts.shape[1] :]
    return calls


def measure(model: StandardTransformer, prompts: torch.Tensor, steps: int, repeats: int) -> list[dict[str, Any]]:
    calls = ours(model, prompts, steps) | theirs(model, prompts, steps)
    answers = {name: call() for name, call in calls.items()}  # the first calls allocate
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round in range(repeats):
        names = list(calls) if round % 2 else list(calls)[::-1]
        for name in names:
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    full = answers["full"].tokens
    rows = []
    for name, answer in answers.items():
        ratios = [a / b for a, b in zip(seconds["full"], seconds[name], strict=True)]
        tokens = answer.tokens if isinstance(answer, ease.Generation) else answer.cpu()
        stats = answer.stats if isinstance(answer, ease.Generation) else {}
        rows.append(
            {
                "way": name,
                "batch": len(prompts),
                "tokens_per_second": full.numel() / statistics.median(seconds[name]),
                "ratio": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
                "same_tokens": (tokens == full).float().mean().item(),
                "layers_per_token": stats.get("layers_per_token"),
                "acceptance": stats.get("acceptance"),
                "draft_exit": stats.get("draft_exit"),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    model, _, corpus, data = open_run(args.run)
    model.to(device)
    test = ease.TokenBatches(corpus.test, PROMPT, max(args.batch))
    prompts = next(iter(test))[0].to(device)
    rows = [row for batch in args.batch for row in measure(model, prompts[:batch], args.new_tokens, args.repeats)]
    print("| way | batch | tokens/s | times full (range) | same tokens | layers per token | drafts accepted |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        layers = "" if r["layers_per_token"] is None else f"{r['layers_per_token']:.1f}"
        accepted = "" if r["acceptance"] is None else f"{r['acceptance']:.0%}"
        print(
            f"| {r['way']} | {r['batch']} | {r['tokens_per_second']:.0f} | {r['ratio']:.2f} ({r['low']:.2f} to "
            f"{r['high']:.2f}) | {r['same_tokens']:.1%} | {layers} | {accepted} |"
        )
    about = machine(device)
    print(
        f"\n{about['cpu']}, {about['threads']} thread(s), {about['device']}, torch {about['torch']}; {data.tokenizer}"
    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
