"""Training strategies: each yields the phases of one training plan.

To add a strategy, write its module in this folder and import its configuration here. `STRATEGIES` lists every
configuration imported below under its `name`, which is the one that recipes and the command line use.
"""

from typing import Any

from ease.strategies.ashem import ASHEMConfig as ASHEMConfig
from ease.strategies.discriminative import DiscriminativeConfig as DiscriminativeConfig
from ease.strategies.draft_brick import BrickConfig as BrickConfig
from ease.strategies.early_exit import EarlyExitConfig as EarlyExitConfig
from ease.strategies.exit_tuning import TuneConfig as TuneConfig
from ease.strategies.gated import GatedConfig as GatedConfig
from ease.strategies.growth import GrowthConfig as GrowthConfig
from ease.strategies.layerskip import LayerSkipConfig as LayerSkipConfig
from ease.strategies.open_growth import OpenGrowthConfig as OpenGrowthConfig
from ease.strategies.single_phase import DeepSupervisionConfig as DeepSupervisionConfig
from ease.strategies.single_phase import StandardConfig as StandardConfig
from ease.strategies.staged import StagedConfig as StagedConfig

STRATEGIES: dict[str, Any] = {
    config.name: config for config in list(globals().values()) if isinstance(config, type) and hasattr(config, "name")
}
