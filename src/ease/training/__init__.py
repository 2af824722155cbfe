"""Configuration, phases, losses, and data selection of training; the loop itself is `ease.trainer`."""
