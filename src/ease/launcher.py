"""The processes that a launcher such as torchrun has started, as it tells them in the environment."""

import os


def num_launched() -> int:
    """The number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launched() -> int:
    """The number of this process, from 0; 0 without a launcher."""
    return int(os.environ.get("RANK", 0)) if num_launched() > 1 else 0
