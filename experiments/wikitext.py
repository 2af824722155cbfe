"""What gains on a split on which phase 1 overfits at once: WikiText-2 at the seed's sizes, held out.

    python experiments/wikitext.py --data ../shared/data/wikitext-2            # runs what is missing, resumes
    python experiments/wikitext.py --data ../shared/data/wikitext-2 --report   # scores test once, prints the table

Word level, 15,936 words, 330,000 training tokens, dim 64, 2 -> 4 layers. Phase 1 memorises its training tokens, so the
states of its training tokens are not those of held-out ones, and what phase 2 learns from them does not carry over.
The variants try to take that difference away. Thresholds at inference come from validation, so that 70% of the tokens
leave early: 65% of full compute by the seed's formula. Everything is chosen on validation.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

import ease
from ease.mining import MinedBatches, compute_confidence_threshold
from ease.trainer import PrintWatch
from experiments.front import spread
from experiments.utils import load_wikitext_words, set_seed

SEQ, BATCH, DIM, HEADS = 32, 64, 64, 4
TRAIN_TOKENS, VAL_TOKENS = 330_000, 66_000
HARD_AT_INFERENCE = 0.3  # of the validation tokens: 0.7 * 0.5 + 0.3 = 65% of full compute
SEEDS = (0,)  # add seeds here; what is done already is not done again


@dataclass(frozen=True)
class Variant:
    """How phase 1 is trained, and what phase 2 learns from."""

    phase1_epochs: int = 100  # at most; it stops earlier when validation does
    fold: float = 1.0  # share of the training text that phase 1 sees
    mine_unseen: bool = False  # phase 2 learns from the rest, not from what phase 1 saw
    ratio: float = 0.5  # hard tokens in phase 2's training
    dropout: float = 0.15  # in phase 2's layers
    lr: float = 1e-3
    continued: bool = False  # no growth: phase 1 trained on


VARIANTS = {
    "continued": Variant(continued=True),
    "hard half": Variant(),
    "all tokens": Variant(ratio=1.0),
    "phase 1 stopped after 3 epochs, all tokens": Variant(phase1_epochs=3, ratio=1.0),
    "phase 1 on 3/4, all of the unseen 1/4": Variant(fold=0.75, mine_unseen=True, ratio=1.0),
    "all tokens, dropout 0.4": Variant(ratio=1.0, dropout=0.4),
}


class Lab:
    """Text, and phase 1 for each way of training it, kept on disk."""

    def __init__(self, folder: Path, data_dir: Path) -> None:
        self.folder = folder
        splits, vocab = load_wikitext_words(data_dir)
        self.vocab_size = len(vocab)
        self.train = splits["train"][:TRAIN_TOKENS]
        self.val = ease.TokenBatches(splits["val"][:VAL_TOKENS], SEQ, BATCH)
        self.test = ease.TokenBatches(splits["test"], SEQ, BATCH)

    def batches(self, start: float, end: float, seed: int) -> ease.TokenBatches:
        ids = self.train[int(start * len(self.train)) : int(end * len(self.train))]
        return ease.TokenBatches(ids, SEQ, BATCH, shuffle=True, seed=seed)

    def model(self, layers: int, seed: int, dropout: float = 0.15) -> ease.StandardTransformer:
        set_seed(seed)
        return ease.StandardTransformer(self.vocab_size, DIM, layers, HEADS, dropout=dropout, tie_embeddings=True)

    def phase1(self, variant: Variant, seed: int) -> ease.StandardTransformer:
        model = self.model(2, seed)
        path = self.folder / f"phase1-{variant.fold:g}-{variant.phase1_epochs}-{seed}.safetensors"
        if not path.exists():
            data = ease.Data(self.batches(0, variant.fold, seed), self.val)
            options = ease.PhaseOptions(lr=3e-3, patience=1, max_epochs=variant.phase1_epochs)
            phase = ease.Phase("phase 1", ease.create_standard_config(2), *data, options)
            ease.Trainer(phase.config, self.vocab_size).run(model, phase, PrintWatch())
            save_model(model, str(path))
        load_model(model, path)
        return model

    def line(self, variant: Variant, seed: int) -> ease.StandardTransformer:
        model = self.model(2, seed, 0.15 if variant.continued else variant.dropout)
        model.load_state_dict(self.phase1(variant, seed).state_dict())
        model.trained_exits = {2}
        options = ease.PhaseOptions(lr=variant.lr, patience=3)
        part = (variant.fold, 1.0) if variant.mine_unseen else (0.0, variant.fold)
        train = self.batches(*part, seed + 1)
        if variant.continued:
            phase = ease.Phase("continued", ease.create_standard_config(2), train, self.val, options)
        else:
            mined = MinedBatches(model, train, ease.Policy(), variant.ratio, seed=seed)
            threshold = compute_confidence_threshold(model, self.val, HARD_AT_INFERENCE)
            model.grow(4)
            config = ease.TrainingConfig(layer_weights={4: 1.0}, exit_layer=2, routing_threshold=threshold)
            phase = ease.Phase("phase 2", config, mined, self.val, options, first=3)
        ease.Trainer(phase.config, self.vocab_size).run(model, phase, PrintWatch())
        return model

    def policy(self, model: ease.StandardTransformer) -> ease.Policy:
        if model.num_layers == 2:
            return ease.Policy()
        return ease.Policy.of(2, compute_confidence_threshold(model, self.val, HARD_AT_INFERENCE, exit=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/wikitext"))
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    lab, rows = Lab(args.out, args.data), []
    for seed in SEEDS:
        whole = args.out / f"phase1-1-100-{seed}.safetensors"
        base = lab.phase1(Variant(), seed) if not args.report or whole.exists() else None
        if base is None:
            continue
        threshold = compute_confidence_threshold(base, lab.val, 0.5)
        hard = {k: ease.score(base, b).confidences < threshold for k, b in (("val", lab.val), ("test", lab.test))}
        for name, variant in [("phase 1", None), *VARIANTS.items()]:
            path = args.out / f"{name.replace('/', '-')}-{seed}.safetensors"
            if variant is None:
                model = copy.deepcopy(base)
            elif path.exists():
                model = lab.model(2 if variant.continued else 4, seed)
                load_model(model, path)
            elif args.report:
                continue
            else:
                print(f"seed {seed}: {name}", flush=True)
                model = lab.line(variant, seed)
                save_model(model, str(path))
            row: dict[str, Any] = {"line": name, "seed": seed}
            row["val"] = ease.score(model, lab.val, lab.policy(model)).figures(hard["val"], depth=4)
            print(f"seed {seed}: {name}: val PPL {row['val']['ppl']:.1f} hard {row['val']['hard_ppl']:.1f}", flush=True)
            if args.report:
                row["test"] = ease.score(model, lab.test, lab.policy(model)).figures(hard["test"], depth=4)
            rows.append(row)
    if args.report:
        (args.out / "test.json").write_text(json.dumps(rows, indent=1))
        print("\n| line | val PPL | val hard PPL | test PPL | test hard PPL | layers run |\n|---|---|---|---|---|---|")
        for name in dict.fromkeys(row["line"] for row in rows):
            mine = [row for row in rows if row["line"] == name]
            cells = [spread([r[s][k] for r in mine], 1) for s in ("val", "test") for k in ("ppl", "hard_ppl")]
            print(f"| {name} | {' | '.join(cells)} | {spread([r['test']['compute_cost'] for r in mine], 2)} |")


if __name__ == "__main__":
    main()
