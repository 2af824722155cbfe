"""The paper's experiments, from training to tables and figures.

Rooms import only rooms before them: `harness`, `strategies` and `analysis`, `tiers`, `studies`, and at the end the
entry points `reproduce` and `paper`.
"""
