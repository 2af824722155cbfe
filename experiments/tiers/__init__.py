"""Experiments of the paper by tier: fronts, ablation and user data."""
