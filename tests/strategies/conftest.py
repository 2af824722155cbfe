import copy
from collections.abc import Callable
from functools import cache

import pytest

from ease import Data, StandardTransformer, Trainer, create_standard_config

Learned = Callable[[int, int], tuple[StandardTransformer, Data]]


@pytest.fixture(scope="session")
def learned(tiny: Callable[..., StandardTransformer], text_data: Callable[..., Data]) -> Learned:
    """(layers, epochs) -> a model whose last exit has learned some of a text for that long, and the text."""

    @cache
    def made(layers: int, epochs: int) -> tuple[StandardTransformer, Data]:
        model, data = tiny(layers), text_data(20, 2)
        trainer = Trainer(create_standard_config(layers), 256)
        optimizer = trainer.create_optimizer(model, 5e-3)
        for _ in range(epochs):
            trainer.train_epoch(model, data.train, optimizer)
        return model.eval(), data

    def get(layers: int, epochs: int) -> tuple[StandardTransformer, Data]:
        model, data = made(layers, epochs)
        return copy.deepcopy(model), data

    return get
