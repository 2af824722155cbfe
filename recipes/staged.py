"""N-stage training: 2, 4 and 6 layers; each phase trains on the least confident tokens of the phase before."""

from ease import PhaseConfig, StagedConfig
from ease.runs.config import DataConfig, RunConfig, ShapeConfig

COMMON = {"lr": 3e-3, "schedule": "cosine", "warmup": 0.05, "patience": None, "max_epochs": 100_000}


def config() -> RunConfig[StagedConfig]:
    return RunConfig(
        name="staged",
        model=ShapeConfig(dim=128),
        data=DataConfig(epoch_batches=200, eval_batches=40),
        strategy=StagedConfig(
            (
                PhaseConfig(layers=2, ratio=1.0, max_flops=1.0e13, **COMMON),
                PhaseConfig(layers=4, ratio=0.5, mine_epochs=4, max_flops=6e12, **COMMON),
                PhaseConfig(layers=6, ratio=0.2, mine_epochs=4, max_flops=4e12, **COMMON),
            )
        ),
    )
