"""Tied against untied output heads at equal training FLOPs, each at two learning rates.

python -m experiments.studies.tied_head
"""

from __future__ import annotations

import torch

import ease
from experiments.utils import set_seed

BUDGET, LRS, SEEDS = 6e11, (4e-3, 1e-2), (0, 1)


def main() -> None:
    torch.set_num_threads(1)
    corpus = ease.load_corpus("stdlib", "bpe:2048")
    val = ease.TokenBatches(corpus.val, 64, 32, max_batches=40)
    for tied in (True, False):
        for lr in LRS:
            ppl = []
            for seed in SEEDS:
                set_seed(seed)
                model = ease.StandardTransformer(corpus.vocab_size, 64, 2, 4, tie_embeddings=tied)
                train = ease.TokenBatches(corpus.train, 64, 32, shuffle=True, seed=seed, max_batches=200)
                options = ease.PhaseOptions(
                    lr=lr, schedule="cosine", warmup=0.05, patience=None, max_epochs=100_000, max_flops=BUDGET
                )
                phase = ease.Phase("standard", ease.create_standard_config(2), train, val, options)
                ease.Trainer(phase.config, corpus.vocab_size).run(model, phase)
                ppl.append(ease.score(model, val).metrics()["ppl"])
            shown = ", ".join(f"{p:.1f}" for p in ppl)
            print(f"{'tied' if tied else 'untied':7} lr {lr:g}: validation PPL {shown}", flush=True)


if __name__ == "__main__":
    main()
