"""LEGO: train a transformer in bricks, and let every token leave at the first brick that is sure of it.

This file is the façade: the names that users import, and the only place that joins core and strategies.
"""

from ease.agreement import learn_agreement
from ease.ashem import ASHEMConfig
from ease.calibration import Calibration, Target, calibrate
from ease.data import Corpus, TokenBatches, load_corpus
from ease.discriminative import DiscriminativeConfig
from ease.early_exit import EarlyExitConfig
from ease.errors import EaseError
from ease.evaluation import Scores, compute_confidence, score
from ease.exits import Policy, Routed, route
from ease.gated import GatedConfig
from ease.generation import Generation, generate
from ease.growth import GrowthConfig
from ease.hf import from_pretrained, save_pretrained
from ease.layerskip import LayerSkipConfig
from ease.mining import (
    MinedBatches,
    collect_hard_examples,
    compute_confidence_threshold,
)
from ease.models import DeepSupervisionTransformer, ModelConfig, StandardTransformer
from ease.open_growth import OpenGrowthConfig
from ease.seam import Batch, ExitModel, Layout
from ease.simple import DeepSupervisionConfig, StandardConfig
from ease.staged import PhaseConfig, StagedConfig
from ease.trainer import (
    Data,
    Phase,
    PhaseOptions,
    StageConfig,
    Strategy,
    Trainer,
    TrainingConfig,
    create_deep_supervision_config,
    create_standard_config,
    train,
)
from ease.tune import TuneConfig

__version__ = "0.1.0"

# Where strategies are listed: the name that a recipe and the command line use, and the configuration.
STRATEGIES = {
    "standard": StandardConfig,
    "deep-supervision": DeepSupervisionConfig,
    "ashem": ASHEMConfig,
    "staged": StagedConfig,
    "tune": TuneConfig,
    "layerskip": LayerSkipConfig,
    "discriminative": DiscriminativeConfig,
    "early-exit": EarlyExitConfig,
    "open-growth": OpenGrowthConfig,
    "growth": GrowthConfig,
    "gated": GatedConfig,
}

__all__ = [
    "STRATEGIES",
    "ASHEMConfig",
    "Batch",
    "Calibration",
    "Corpus",
    "Data",
    "DeepSupervisionConfig",
    "DeepSupervisionTransformer",
    "DiscriminativeConfig",
    "EarlyExitConfig",
    "EaseError",
    "ExitModel",
    "GatedConfig",
    "Generation",
    "GrowthConfig",
    "LayerSkipConfig",
    "Layout",
    "MinedBatches",
    "ModelConfig",
    "OpenGrowthConfig",
    "Phase",
    "PhaseConfig",
    "PhaseOptions",
    "Policy",
    "Routed",
    "Scores",
    "StageConfig",
    "StagedConfig",
    "StandardConfig",
    "StandardTransformer",
    "Strategy",
    "Target",
    "TokenBatches",
    "Trainer",
    "TrainingConfig",
    "TuneConfig",
    "calibrate",
    "collect_hard_examples",
    "compute_confidence",
    "compute_confidence_threshold",
    "create_deep_supervision_config",
    "create_standard_config",
    "from_pretrained",
    "generate",
    "learn_agreement",
    "load_corpus",
    "route",
    "save_pretrained",
    "score",
    "train",
]
