"""Strategies that only the experiments use."""
