"""What the tests share: one thread, fixed seeds, tiny models, a little real text and one finished run."""

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_runs import COMPARE, TINY, budget
from hypothesis import Phase, settings

from ease import Data, Layout, Policy, StandardTransformer, TokenBatches, Trainer, create_deep_supervision_config
from ease.cli.main import main
from ease.routing.forward import routed_forward

# Busy machines make deadlines lie, and a test that fails once should fail again. Examples are drawn small, and
# shrinking one that runs a model takes minutes.
settings.register_profile(
    "ease", deadline=None, max_examples=20, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate)
)
settings.load_profile("ease")
torch.set_num_threads(1)
# Commands that tests start, too: with a thread for each core, they wait for each other when the machine is busy.
os.environ["OMP_NUM_THREADS"] = "1"

LICENSE = Path(__file__).parents[1] / "LICENSE"

Make = Callable[..., StandardTransformer]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny() -> Make:
    """Makes a tiny byte-level model in eval mode: `tiny(3, sharp=True, dropout=0.1)`."""

    def make(num_layers: int = 2, *, seed: int = 0, sharp: bool = False, **options: object) -> StandardTransformer:
        """`sharp`: a head scaled so that an untrained model is surer of some tokens than of others, and other norms."""
        torch.manual_seed(seed)
        shape = {"vocab_size": 256, "dim": 32, "num_heads": 4} | options
        model = StandardTransformer(num_layers=num_layers, **shape).eval()  # type: ignore[arg-type]
        if sharp:
            with torch.no_grad():
                for weight in {model.output_head.weight, model.embedding.weight}:
                    weight *= 20
                for name, weight in model.named_parameters():
                    if "norm" in name:
                        weight.uniform_(0.5, 1.5)
        return model

    return make


@pytest.fixture(scope="session")
def text() -> torch.Tensor:
    """Real text as bytes: the license, which is the same in every version of Python."""
    return torch.tensor(list(LICENSE.read_bytes()), dtype=torch.int32)


@pytest.fixture(scope="session")
def text_data(text: torch.Tensor) -> Callable[..., Data]:
    """Makes train and validation batches of different windows of the text."""

    def make(train: int = 8, val: int = 2, *, seq_len: int = 32, batch_size: int = 8) -> Data:
        batches = list(TokenBatches(text, seq_len, batch_size, shuffle=True, max_batches=train + val))
        return Data(batches[:train], batches[train:])

    return make


@pytest.fixture(scope="session")
def _trained(tiny: Make, text_data: Callable[..., Data]) -> StandardTransformer:
    model, data = tiny(2), text_data(20, 1)
    trainer = Trainer(create_deep_supervision_config(2), 256)
    optimizer = trainer.create_optimizer(model, 5e-3)
    for _ in range(3):
        trainer.train_epoch(model, data.train, optimizer)
    return model.eval()


@pytest.fixture
def trained(_trained: StandardTransformer) -> StandardTransformer:
    """Two layers and two exits that have learned a little of the text; a copy of one's own."""
    return copy.deepcopy(_trained)


@pytest.fixture(scope="session")
def even_policy() -> Callable[..., Policy]:
    """Makes the policy under which equal shares of the tokens leave at each exit and at the end.

    `options` are the policy's further fields. Patience counts exits, which no threshold can divide evenly.
    """

    def make(
        model: StandardTransformer,
        ids: torch.Tensor,
        exits: tuple[int, ...],
        layout: Layout | None = None,
        **options: Any,
    ) -> Policy:
        thresholds: tuple[float, ...] = ()
        places = torch.arange(ids.shape[1]).expand_as(ids) if layout is None else layout.positions
        for i, layer in enumerate(exits):
            policy = Policy(exits[: i + 1], (*thresholds, math.inf), **options)
            with torch.no_grad():
                stop = next(stop for stop in routed_forward(model, ids, policy, layout=layout) if stop.layer == layer)
            # A threshold t asks for t + (1 - t) raised: this is the t that a token just meets.
            raised = policy.limits(0.0, places[stop.queried], torch.float64)
            leaves_at = ((stop.confidence - raised) / (1 - raised)).masked_fill(raised >= 1, -torch.inf)
            ordered = leaves_at.sort(descending=True).values.tolist()
            leaving = max(1, round(len(ordered) / (len(exits) + 1 - i)))
            thresholds += ((ordered[leaving - 1] + ordered[leaving]) / 2,)
        return Policy(exits, thresholds, **options)

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real text, small enough for a run in tests: the license, three times."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(LICENSE.read_text(encoding="utf-8") * 3, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def made(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the demo, tiny. It is shared: tests write elsewhere."""
    out = tmp_path_factory.mktemp("runs") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EASE_CACHE", str(out.parent / "cache"))
        options = [*TINY, *budget("5e8"), *COMPARE]
        assert main(["run", "demo", "--data", str(text_file), "--out", str(out), *options]) == 0
    return out
