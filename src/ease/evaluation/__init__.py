"""Scoring under a policy, calibration of thresholds, task metrics, and decoding speed."""

from ease.evaluation.calibration import Calibration, Target, calibrate
from ease.evaluation.scoring import Scores, perplexity, score

__all__ = ["Calibration", "Scores", "Target", "calibrate", "perplexity", "score"]
