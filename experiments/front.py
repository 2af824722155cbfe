"""Where does growing on hard tokens stand? Every line at equal training FLOPs on the standard library corpus.

    python experiments/front.py --brick 1             # runs what is missing of the plan, resumes where it stopped
    python experiments/front.py --brick 1 --report    # picks settings on validation, scores test once, prints a table

A small brick that is near its limit (byte-level, dim 48), so that depth has something to give. The lines are plain
models of every depth, deep supervision with the same exits, phase 1 trained on ("continued"), and growth in several
variants. Each line gets the same trials of the learning rate (phase 1's and, where there is one, the later phase's),
and what is chosen, is chosen on validation. FLOPs count everything: training, mining, trunk and validation passes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

import ease
from ease.mining import MinedBatches, compute_confidence_threshold
from ease.trainer import History
from experiments.utils import set_seed

DIM, HEADS, SEQ, BATCH = 48, 4, 128, 32
EPOCH_STEPS, VAL_BATCHES, TEST_BATCHES = 200, 20, 80
BUDGET = 2e12  # training FLOPs of every line
PHASE1_SHARE = 0.6
LRS = (1e-2, 2e-2)
HARD = 0.5  # share of hard tokens at inference, unless a variant says otherwise

Line = Callable[["Lab", int, float], tuple[ease.StandardTransformer, list[History], ease.Policy]]


class Lab:
    """Data and the pieces that lines are made of."""

    def __init__(self, folder: Path, brick: int) -> None:
        self.folder, self.brick = folder, brick  # brick: the layers of phase 1
        self.corpus = ease.load_corpus("stdlib", "byte")
        self.val = ease.TokenBatches(self.corpus.val, SEQ, BATCH, max_batches=VAL_BATCHES)
        self.test = ease.TokenBatches(self.corpus.test, SEQ, BATCH, max_batches=TEST_BATCHES)

    def data(self, seed: int) -> ease.Data:
        train = ease.TokenBatches(self.corpus.train, SEQ, BATCH, shuffle=True, seed=seed, max_batches=EPOCH_STEPS)
        return ease.Data(train, self.val)

    def model(self, layers: int, seed: int) -> ease.StandardTransformer:
        set_seed(seed)
        return ease.StandardTransformer(self.corpus.vocab_size, DIM, layers, HEADS, tie_embeddings=True)

    def options(self, lr: float, flops: float) -> ease.PhaseOptions:
        return ease.PhaseOptions(
            lr=lr, schedule="cosine", warmup=0.05, patience=None, max_epochs=1_000_000, max_flops=flops
        )

    def fit(self, model: ease.StandardTransformer, phase: ease.Phase) -> History:
        return ease.Trainer(phase.config, self.corpus.vocab_size).run(model, phase)

    def weights(self, line: str, seed: int, lr: float) -> Path:
        return self.folder / f"{line}-{seed}-{lr:g}.safetensors"

    def phase1(self, seed: int) -> tuple[ease.StandardTransformer, float]:
        """Phase 1 of a seed at the learning rate that validation chose, and the FLOPs it took."""
        rows = [r for r in read(self.folder) if r["line"] == "phase 1" and r["seed"] == seed]
        best = min(rows, key=lambda r: r["val"]["loss"])
        model = self.model(self.brick, seed)
        model.trained_exits = {self.brick}
        load_model(model, self.weights("phase 1", seed, best["lr"]))
        return model, best["flops"]


def plain(layers: int, share: float = 1.0) -> Line:
    """A standard model of that depth."""

    def line(lab: Lab, seed: int, lr: float) -> Any:
        model, data = lab.model(layers, seed), lab.data(seed)
        config = ease.create_standard_config(layers)
        history = lab.fit(model, ease.Phase("plain", config, *data, lab.options(lr, share * BUDGET)))
        return model, [history], ease.Policy()

    return line


def deep_supervision(layers: int) -> Line:
    """The loss at the exit and at the end; the threshold sends as many tokens on as growth does."""

    def line(lab: Lab, seed: int, lr: float) -> Any:
        model, data = lab.model(layers, seed), lab.data(seed)
        config = ease.TrainingConfig(layer_weights={lab.brick: 0.5, layers: 0.5})
        history = lab.fit(model, ease.Phase("joint", config, *data, lab.options(lr, BUDGET)))
        threshold = compute_confidence_threshold(model, lab.val, HARD, exit=lab.brick)
        return model, [history], ease.Policy.of(lab.brick, threshold)

    return line


def continued(lab: Lab, seed: int, lr: float) -> Any:
    """Phase 1 trained on, on fresh data, for what phase 2 gets."""
    model, spent = lab.phase1(seed)
    data = lab.data(seed)
    data.train.epoch = 10_000  # past the epochs of phase 1: the order goes on, it does not start again
    config = ease.create_standard_config(lab.brick)
    history = lab.fit(model, ease.Phase("continued", config, *data, lab.options(lr, BUDGET - spent)))
    return model, [history], ease.Policy()


def growth(layers: int, ratio: float = HARD, init: str = "identity", route_share: float | None = None) -> Line:
    """Phase 2 on the frozen brick, on the hard tokens alone (ratio 1: on all)."""

    def line(lab: Lab, seed: int, lr: float) -> Any:
        model, spent = lab.phase1(seed)
        data = lab.data(seed)
        data.train.epoch = 10_000
        train = replace_epoch(data.train, 4 * EPOCH_STEPS)
        mined = MinedBatches(model, train, ease.Policy(), ratio, seed=seed)
        threshold = mined.threshold
        if route_share is not None:
            threshold = compute_confidence_threshold(model, lab.val, route_share)
        model.grow(layers, init)  # type: ignore[arg-type]
        config = ease.TrainingConfig(layer_weights={layers: 1.0}, exit_layer=lab.brick, routing_threshold=threshold)
        phase = ease.Phase(
            "phase 2",
            config,
            mined,
            lab.val,
            lab.options(lr, BUDGET - spent),
            first=lab.brick + 1,
            spent={"mining": mined.flops},
        )
        return model, [lab.fit(model, phase)], config.policy

    return line


def replace_epoch(batches: ease.TokenBatches, steps: int) -> ease.TokenBatches:
    """The same stream with longer epochs: what is mined at once should not repeat too often."""
    fresh = ease.TokenBatches(
        batches.ids, batches.seq_len, batches.batch_size, shuffle=True, seed=batches.seed, max_batches=steps
    )
    fresh.epoch = batches.epoch
    return fresh


def lines(brick: int) -> dict[str, Line]:
    """The plan, in order: what others stand on comes first."""
    above, twice = brick + 1, brick + 2
    plain_lines = {f"plain, {k} layers": plain(k) for k in (brick, above, twice)}
    return {
        "phase 1": plain(brick, PHASE1_SHARE),
        **plain_lines,
        "continued": continued,
        "deep supervision": deep_supervision(above),
        f"growth {brick} to {above}, half": growth(above),
        f"growth {brick} to {twice}, half": growth(twice),
        f"growth {brick} to {above}, half, copied": growth(above, init="copy"),
        f"growth {brick} to {above}, a third": growth(above, 0.33),
        f"growth {brick} to {above}, all tokens, routed at half": growth(above, 1.0, route_share=HARD),
    }


def read(folder: Path) -> list[dict[str, Any]]:
    path = folder / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(lab: Lab, name: str, seed: int, lr: float) -> None:
    model, histories, policy = lines(lab.brick)[name](lab, seed, lr)
    save_model(model, str(lab.weights(name, seed, lr)))
    flops: dict[str, float] = {}
    for history in histories:
        for kind, count in history.flops.items():
            flops[kind] = flops.get(kind, 0.0) + count
    row = {
        "line": name,
        "seed": seed,
        "lr": lr,
        "layers": model.num_layers,
        "flops": sum(flops.values()),
        "flops_by": flops,
        "seconds": sum(history.seconds for history in histories),
        "policy": {"exits": policy.exits, "thresholds": policy.thresholds},
        "val": ease.score(model, lab.val, policy).figures(),
        "curve": [[r["flops"], r["train_loss"], r["val_loss"]] for history in histories for r in history.rows],
    }
    with (lab.folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{name:45} seed {seed} lr {lr:g} val PPL {row['val']['ppl']:.4f}  {row['seconds']:.0f} s", flush=True)


def work(lab: Lab, seeds: list[int], only: str | None) -> None:
    """The plan: every learning rate on the first seed, then the chosen one on the others."""
    for seed in seeds:
        for name in lines(lab.brick):
            if only and only not in name:
                continue
            rows = [r for r in read(lab.folder) if r["line"] == name]
            first = [r for r in rows if r["seed"] == 0]
            lrs = LRS if seed == 0 else [min(first, key=lambda r: r["val"]["loss"])["lr"]]
            for lr in lrs:
                lock = lab.folder / f"{name}-{seed}-{lr:g}.lock"
                if any(r["seed"] == seed and r["lr"] == lr for r in rows):
                    continue
                try:  # another process may be at it; a lock that a killed one left behind has to be deleted
                    os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    continue
                try:
                    run(lab, name, seed, lr)
                finally:
                    lock.unlink()


def report(lab: Lab, seeds: list[int]) -> None:
    """The test split, scored once per line and seed at the settings that validation chose."""
    rows = read(lab.folder)
    out: list[dict[str, Any]] = []
    for seed in seeds:
        brick, _ = lab.phase1(seed)
        threshold = compute_confidence_threshold(brick, lab.val, HARD)
        hard = ease.score(brick, lab.test).confidences < threshold
        for name in lines(lab.brick):
            mine = [r for r in rows if r["line"] == name and r["seed"] == seed]
            if not mine:
                continue
            best = min(mine, key=lambda r: r["val"]["loss"])
            model = lab.model(best["layers"], seed)
            load_model(model, str(lab.weights(name, seed, best["lr"])))
            policies = {name: ease.Policy(**{k: tuple(v) for k, v in best["policy"].items()})}
            if name == f"growth {lab.brick} to {lab.brick + 2}, half":
                # The deeper growth at other thresholds, set on validation by the share of tokens that go on.
                for share in (0.2, 0.3, 0.4):
                    threshold = compute_confidence_threshold(model, lab.val, share, exit=lab.brick)
                    policies[f"{name}; {share:.0%} go on"] = ease.Policy.of(lab.brick, threshold)
            for label, policy in policies.items():
                figures = ease.score(model, lab.test, policy).figures(hard, depth=lab.brick + 2)
                out.append({"line": label, "seed": seed, "lr": best["lr"], "flops": best["flops"], "test": figures})
    (lab.folder / "test.json").write_text(json.dumps(out, indent=1))
    print("| line | lr | test PPL | hard PPL | share of layers run | FLOPs/token | training FLOPs |")
    print("|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(r["line"] for r in out):
        mine = [r for r in out if r["line"] == name]
        if mine:
            print(
                f"| {name} | {mine[0]['lr']:g} | {spread([r['test']['ppl'] for r in mine])} "
                f"| {spread([r['test']['hard_ppl'] for r in mine])} "
                f"| {spread([r['test']['compute_cost'] for r in mine], 2)} "
                f"| {sum(r['test']['flops_per_token'] for r in mine) / len(mine) / 1e3:.0f}k "
                f"| {sum(r['flops'] for r in mine) / len(mine):.2e} |"
            )


def spread(values: list[float], digits: int = 3) -> str:
    t = torch.tensor(values, dtype=torch.float64)
    return f"{t.mean():.{digits}f}" + (f" ± {t.std():.{digits}f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brick", type=int, default=1, help="layers of phase 1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--only", help="lines whose name contains this")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.out / f"front-brick{args.brick}"
    folder.mkdir(parents=True, exist_ok=True)
    lab = Lab(folder, args.brick)
    if args.report:
        report(lab, args.seeds)
    else:
        work(lab, args.seeds, args.only)


if __name__ == "__main__":
    main()
