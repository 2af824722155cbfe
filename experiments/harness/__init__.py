"""Training and measurement of an experiment's lines."""
