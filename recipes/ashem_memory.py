"""ASHEM on a memory: the memory is phase 1, and two layers learn the half of the tokens that it is least sure of."""

from ease import ASHEMConfig
from ease.runs.config import DataConfig, RunConfig, ShapeConfig


def config() -> RunConfig[ASHEMConfig]:
    return RunConfig(
        name="ashem-memory",
        model=ShapeConfig(dim=48, tie_embeddings=True, memory_orders=(2, 3, 4, 6)),
        data=DataConfig(tokenizer="byte", seq_len=128, batch_size=32, epoch_batches=200, eval_batches=20),
        strategy=ASHEMConfig(
            phase1_layers=0,
            phase1_lr=2e-2,
            phase1_patience=None,
            phase1_max_epochs=100_000,
            phase1_max_flops=4e11,
            hard_example_ratio=0.5,
            phase2_layers=2,
            phase2_lr=2e-2,
            phase2_patience=None,
            phase2_max_epochs=100_000,
            phase2_max_flops=1.6e12,
            mine_epochs=4,
            schedule="cosine",
            warmup=0.05,
        ),
    )
