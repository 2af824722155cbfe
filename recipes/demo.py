"""Two bricks on Python's own library, minutes on two cores: the whole of LEGO at a small budget."""

from ease import ASHEMConfig
from ease.runs import DataConfig, RunConfig, ShapeConfig

PHASE1, PHASE2 = 0.6e12, 0.4e12  # training FLOPs


def config() -> RunConfig:
    return RunConfig(
        name="demo",
        note="Demo budget: about a minute of training a line. The ranking of lines changes with the budget.",
        model=ShapeConfig(dim=64),
        data=DataConfig(tokenizer="bpe:1024", seq_len=64, batch_size=32, epoch_batches=200, eval_batches=40),
        strategy=ASHEMConfig(
            phase1_layers=2,
            phase1_lr=6e-3,
            phase1_patience=None,
            phase1_max_epochs=100_000,
            phase1_max_flops=PHASE1,
            hard_example_ratio=0.5,
            phase2_layers=4,
            phase2_lr=3e-3,
            phase2_patience=None,
            phase2_max_epochs=100_000,
            phase2_max_flops=PHASE2,
            schedule="cosine",
            warmup=0.05,
        ),
    )
