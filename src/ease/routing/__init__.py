"""The routed forward and the confidence measures that decide which tokens leave at an exit."""

from ease.routing.forward import ExitStep, Routed, compute_confidence, route, routed_forward

__all__ = ["ExitStep", "Routed", "compute_confidence", "route", "routed_forward"]
