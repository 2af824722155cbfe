"""ASHEM: one layer on all tokens, then a second one on the hard half (measured in docs/research/results.md)."""

from ease import ASHEMConfig
from ease.runs.config import DataConfig, RunConfig, ShapeConfig


def config() -> RunConfig[ASHEMConfig]:
    return RunConfig(
        name="ashem",
        model=ShapeConfig(dim=48, tie_embeddings=True),
        data=DataConfig(tokenizer="byte", seq_len=128, batch_size=32, epoch_batches=200, eval_batches=20),
        strategy=ASHEMConfig(
            phase1_layers=1,
            phase1_lr=2e-2,
            phase1_patience=None,
            phase1_max_epochs=100_000,
            phase1_max_flops=1.2e12,
            hard_example_ratio=0.5,
            phase2_layers=2,
            phase2_lr=2e-2,
            phase2_patience=None,
            phase2_max_epochs=100_000,
            phase2_max_flops=0.8e12,
            mine_epochs=4,
            schedule="cosine",
            warmup=0.05,
        ),
    )
