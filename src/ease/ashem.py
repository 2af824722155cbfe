"""ASHEM, the main strategy, under the name that the original gives it."""

from ease.routing.forward import compute_confidence as compute_confidence
from ease.strategies.ashem import ASHEMConfig as ASHEMConfig
from ease.training.mining import collect_hard_examples as collect_hard_examples
from ease.training.mining import compute_confidence_threshold as compute_confidence_threshold
