"""Promise 7: the core knows no strategy, a new one changes nothing else, and `import ease` loads only its needs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grimp
import pytest
import torch

import ease
from ease import (
    STRATEGIES,
    Data,
    ExitModel,
    Phase,
    PhaseOptions,
    Policy,
    StandardTransformer,
    Trainer,
    TrainingConfig,
    create_standard_config,
    train,
)

ROOT = Path(__file__).parents[2]
SOURCE = Path(ease.__file__).parents[1]
# The rooms above the strategies, which run and show them, and the command line of lm-evaluation-harness.
ABOVE = ("ease.__main__", "ease.cli", "ease.runs", "ease.ashem", "ease.hf.lm_eval")


def python(code: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(SOURCE)}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_import_rules_hold() -> None:
    done = python("from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_no_core_module_reaches_a_strategy() -> None:
    graph = grimp.build_graph("ease", cache_dir=None)
    strategies = {module for module in graph.modules if module.startswith("ease.strategies")}
    assert {config.__module__ for config in STRATEGIES.values()} <= strategies
    above = {module for module in graph.modules if module.startswith(ABOVE)}
    core = graph.modules - strategies - above - {"ease"}
    assert {
        "ease.trainer",
        "ease.training.mining",
        "ease.models",
        "ease.evaluation.scoring",
        "ease.routing.forward",
    } <= core
    reached = {
        module: found for module in core if (found := graph.find_upstream_modules(module) & (strategies | above))
    }
    assert not reached


def test_there_is_no_import_cycle() -> None:
    """Imports for annotations count, too."""
    graph = grimp.build_graph("ease", cache_dir=None, exclude_type_checking_imports=False)
    cycles = {module for module in graph.modules if module in graph.find_upstream_modules(module)}
    assert not cycles


@pytest.mark.parametrize("folder", ["src", "experiments"])
def test_no_file_is_longer_than_500_lines(folder: str) -> None:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert lengths
    assert not {path: length for path, length in lengths.items() if length > 500}


def test_importing_ease_loads_no_heavy_optional_library() -> None:
    done = python("import json, sys, ease; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    loaded = set(json.loads(done.stdout))
    assert "ease" in loaded
    heavy = {"torch", "numpy", "tokenizers", "tyro", "rich", "matplotlib", "transformers", "datasets", "safetensors"}
    assert not loaded & heavy


def test_all_public_names_exist() -> None:
    assert len(ease.__all__) == len(set(ease.__all__)) >= 50
    assert all(hasattr(ease, name) for name in ease.__all__)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_listed_strategy_starts_from_its_defaults(name: str, tiny: Callable[..., StandardTransformer]) -> None:
    config = STRATEGIES[name]()
    strategy, model = config.strategy(), tiny(config.num_layers or 4)
    ids = torch.zeros(1, 2, dtype=torch.long)
    phase = strategy.next_phase(model, Data([(ids, ids)], [(ids, ids)]))
    assert phase is not None
    phase.config.check(model.num_layers)
    assert isinstance(strategy.policy(), Policy)


class TopFirst:
    """A strategy that ease has never heard of: the upper layer alone, then all, each for one epoch."""

    def __init__(self) -> None:
        self.firsts = [2, 1]

    def policy(self) -> Policy:
        return Policy()

    def next_phase(self, model: ExitModel, data: Data) -> Phase | None:
        if not self.firsts:
            return None
        config = create_standard_config(model.num_layers)
        options = PhaseOptions(lr=3e-3, max_epochs=1)
        return Phase("mine", config, data.train, data.val, options, first=self.firsts.pop(0))


def test_a_new_strategy_trains_with_nothing_else_changed(
    tiny: Callable[..., StandardTransformer], text_data: Callable[..., Data]
) -> None:
    model, data = tiny(2), text_data(6, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = Trainer(create_standard_config(2), 256).evaluate(model, data.val)["loss"]
    moved, losses = [], []
    for phase, history in train(model, TopFirst(), data):
        assert isinstance(phase.config, TrainingConfig)
        after = {name: value.clone() for name, value in model.state_dict().items()}
        moved.append({name for name in before if not torch.equal(before[name], after[name])})
        losses.append(history.rows[-1]["val_loss"])
        before = after
    assert {".".join(name.split(".")[:2]) for name in moved[0]} == {"layers.1", "exit_norms.1"}
    assert {"embedding.weight", "layers.0.ffn.up_proj.weight"} <= moved[1]
    assert losses[1] < losses[0] < start
