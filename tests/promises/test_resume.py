"""Promise 6: a run killed at any moment and begun again ends bit-identical to one that was not (on a CPU).

Everything here is killed several times over: after a step, after an epoch's validation, in every phase and line. Models
have dropout and batches are shuffled, so that whatever is not put back shows.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import ease
from ease import Data, EaseError, PhaseConfig, StandardTransformer, TokenBatches, Trainer, train
from ease.cli.main import main
from ease.cli.recipes import load_recipe
from ease.data.batches import Example, ExampleBatches
from ease.data.streaming import load_stream
from ease.progress import Progress, StepMetrics
from ease.runs.config import RunConfig
from ease.runs.runner import run
from ease.storage import CHECKPOINTS, output_folder
from ease.training import checkpoint as resume
from ease.training.checkpoint import Checkpoint
from ease.training.phases import History

SPLIT = 4000  # bytes of the text to train on; validation lies behind them


class Killed(BaseException):
    """Ends the process, as far as the code under test can tell."""


class Killer(Progress):
    """Kills at the first step or epoch that is told after `steps` steps of its life, all phases and lines counted."""

    def __init__(self, steps: float = float("inf"), at: str = "step") -> None:
        self.steps, self.at = steps, at

    def step(self, fraction: float, metrics: StepMetrics | None = None) -> None:
        self.steps -= metrics is not None  # what is told again has none
        if self.steps < 0 and self.at == "step":
            raise Killed

    def epoch(self, row: Any) -> None:
        if self.steps < 0:
            raise Killed


class Drawing(Killer):
    """Draws random numbers, as one does who shows a sample after each epoch."""

    def epoch(self, row: Any) -> None:
        torch.rand(3)
        super().epoch(row)


@pytest.fixture(autouse=True)
def _save_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "EVERY", 0.0)


def rows(text: torch.Tensor, **options: Any) -> TokenBatches:
    return TokenBatches(text[:SPLIT], 16, 4, **{"shuffle": True, "max_batches": 5, **options})


def data_of(text: torch.Tensor, **options: Any) -> Data:
    return Data(rows(text, **options), TokenBatches(text[SPLIT:], 16, 4, max_batches=2))


def small(num_layers: int, **options: Any) -> StandardTransformer:
    return StandardTransformer(256, 16, num_layers, 2, dropout=0.1, **options)


def standing(model: Any, strategy: Any, data: Data, histories: list[History]) -> dict[str, Any]:
    """All that a caller has when training is done, but for how long it took."""
    told = [asdict(history) | {"seconds": 0} for history in histories]
    for row in (row for history in told for row in history["rows"]):
        del row["seconds"]
    return {
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "trained": model.trained_exits,
        "told": told,
        "policy": strategy.policy(),
        "mined": getattr(strategy, "mined", None),
        "random": torch.get_rng_state().tolist(),
        "train": repr(data.train.state_dict()) if hasattr(data.train, "state_dict") else None,
    }


Setting = Callable[[], tuple[Any, Any, Data]]


def ends(
    setting: Setting, folder: Path | None, lives: list[Killer], killed: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Trains through all lives, each with everything made anew and `killed` called after it, and lives on at last."""
    for life in [*lives, Killer()]:
        killer = Drawing(life.steps, life.at)
        torch.manual_seed(7)
        model, strategy, data = setting()
        histories: list[History] = []
        with suppress(Killed):
            for _, history in train(model, strategy, data, progress=lambda _, k=killer: k, checkpoints=folder):
                histories.append(history)
                torch.rand(1)  # as one does who looks at the model between two phases
            break
        killed()
    return standing(model, strategy, data, histories)


def check(setting: Setting, folder: Path, lives: list[Killer]) -> None:
    whole = ends(setting, None, [])
    again = ends(setting, folder, lives)
    assert [name for name in whole if whole[name] != again[name]] == []


SHORT = {"lr": 3e-3, "max_epochs": 3, "schedule": "cosine", "warmup": 0.1}
STRATEGIES: dict[str, Any] = {
    "ashem": ease.ASHEMConfig(phase1_max_epochs=3, phase2_max_epochs=3, phase2_lr=3e-3, schedule="cosine"),
    "ashem, on a memory": ease.ASHEMConfig(phase1_layers=0, phase1_max_epochs=3, phase2_max_epochs=3, phase2_lr=3e-3),
    "ashem, as the seed did": ease.ASHEMConfig(phase1_max_epochs=2, phase2_max_epochs=2, protocol="original"),
    "n-stage": ease.StagedConfig(
        tuple(PhaseConfig(layers=n, ratio=r, supervise="every", **SHORT) for n, r in ((1, 1.0), (2, 0.5), (3, 0.3))),
        trunk_budget=3000,  # so that some of the trunk's states are kept and some are not
    ),
    "budgets": ease.StagedConfig(
        tuple(PhaseConfig(layers=n, ratio=1 / n, max_flops=2e7 * n, patience=None, schedule="cosine") for n in (1, 2))
    ),
    "open growth": ease.OpenGrowthConfig(**SHORT | {"max_epochs": 6}),
    "gated": ease.GatedConfig(exit_layer=2, **SHORT | {"max_epochs": 6}),
    "layerskip": ease.LayerSkipConfig(curriculum="gradual", dropout_schedule="exponential", layer_dropout=0.5, **SHORT),
    "early exit": ease.EarlyExitConfig(objective="both", **SHORT),
    "deep supervision": ease.DeepSupervisionConfig(**SHORT),
    "discriminative": ease.DiscriminativeConfig(**SHORT),
    "growth": ease.GrowthConfig(**SHORT | {"max_epochs": 6}),
    "tune": ease.TuneConfig(exits=(1, 2), adapter="mlp", tokens="hard", objective="both", **SHORT),
    "brick": ease.BrickConfig(**SHORT),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_ends_the_same(name: str, text: torch.Tensor, tmp_path: Path) -> None:
    config = STRATEGIES[name]
    depth, shape = 3 if config.num_layers is None else config.num_layers, {}
    if not depth:
        shape = {"memory_orders": (2, 3), "memory_rows": 50}
    make = lambda: (small(depth, **shape), config.strategy(), data_of(text))  # noqa: E731
    check(make, tmp_path, [Killer(2), Killer(1, "epoch"), Killer(0), Killer(7), Killer(0, "epoch"), Killer(4)])


def test_the_best_epoch_is_remembered(text: torch.Tensor, tmp_path: Path) -> None:
    """Killed after validation has become worse, and resumed until patience ends."""
    config = ease.DeepSupervisionConfig(num_layers=2, patience=3, lr=1e-2, max_epochs=12)
    data = data_of(text)
    # Random targets: every epoch of training makes the model worse on them, on any machine.
    noise = [(x, torch.randint(256, y.shape, generator=torch.Generator().manual_seed(0))) for x, y in data.val]

    def make() -> tuple[Any, Any, Any]:
        return small(2), config.strategy(), data_of(text)._replace(val=noise)

    (told,) = ends(make, None, [])["told"]
    assert told["stopped_early"]
    assert len(told["rows"]) == told["best_epoch"] + 3
    check(make, tmp_path, [Killer(5 * told["best_epoch"] + 2)])


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    moments=st.lists(st.tuples(st.integers(0, 25), st.sampled_from(["step", "epoch"])), min_size=1, max_size=4),
    every=st.integers(1, 9),
)
def test_wherever_it_is_killed(
    text: torch.Tensor, tmp_path_factory: pytest.TempPathFactory, moments: list[tuple[int, str]], every: int
) -> None:
    """Saved at every so many moments only, so that steps are taken twice."""
    config, told = STRATEGIES["ashem"], itertools.count(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "due", lambda self: self.path is not None and next(told) % every == 0)
        make = lambda: (small(2), config.strategy(), data_of(text))  # noqa: E731
        check(make, tmp_path_factory.mktemp("kept"), [Killer(*moment) for moment in moments])


# ---------------------------------------------------------------------------------------------------------
# Batches


class Drawn:
    """Batches in an order that torch's own generator draws, and some without a target."""

    def __init__(self, text: torch.Tensor) -> None:
        self.batches = list(rows(text))
        x, y = self.batches[0]
        self.batches.append((x, torch.full_like(y, -100)))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for at in torch.randperm(len(self)).tolist():
            yield self.batches[at]


def examples(text: torch.Tensor) -> list[Example]:
    return [Example(text[i : i + 5 + i % 7], text[i + 1 : i + 6 + i % 7]) for i in range(0, 600, 20)]


KINDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "passes": lambda text: TokenBatches(text[:900], 16, 4, shuffle=True, max_batches=9, drop_last=False),
    "a loader": lambda text: DataLoader(
        list(zip(text[:400].long().view(-1, 8), text[1:401].long().view(-1, 8))), 7, True
    ),
    "a list": lambda text: list(rows(text)),
    "drawn": Drawn,
    "examples": lambda text: ExampleBatches(examples(text), 4, shuffle=True, bucket=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_go_on(kind: str, text: torch.Tensor, tmp_path: Path) -> None:
    config = ease.GrowthConfig(layers=(1, 2), **SHORT | {"max_epochs": 6})
    make = lambda: (small(1), config.strategy(), Data(KINDS[kind](text), data_of(text).val))  # noqa: E731
    check(make, tmp_path, [Killer(3), Killer(4, "epoch"), Killer(9), Killer(0)])


def test_a_stream_goes_on(text: torch.Tensor, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    whole = bytes(text.tolist()).decode("latin-1")
    documents = [whole[i : i + 40 + i % 90] for i in range(0, 6000, 130)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))

    def make() -> tuple[Any, Any, Data]:
        options = {"seq_len": 16, "batch_size": 4, "epoch_batches": 5, "held_out": 6, "buffer": 9}
        stream = load_stream(str(tmp_path / "text.jsonl"), "byte", **options)
        model = StandardTransformer(stream.tokenizer.get_vocab_size(), 16, 1, 2, dropout=0.1)
        config = ease.ASHEMConfig(phase1_layers=1, phase2_layers=2, phase1_max_epochs=3, phase2_max_epochs=2)
        return model, config.strategy(), Data(stream.train, stream.val)

    check(make, tmp_path / "kept", [Killer(2), Killer(3, "epoch"), Killer(9)])


# ---------------------------------------------------------------------------------------------------------
# The files


def killed(setting: Setting, folder: Path, steps: int = 3) -> None:
    model, strategy, data = setting()
    with suppress(Killed):
        list(train(model, strategy, data, progress=lambda _: Killer(steps), checkpoints=folder))


def test_a_model_that_is_trained_is_not_trained_again(text: torch.Tensor, tmp_path: Path) -> None:
    config = STRATEGIES["ashem"]
    make = lambda: (small(2), config.strategy(), data_of(text))  # noqa: E731
    first = ends(make, tmp_path, [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "compute_loss", lambda *_, **__: pytest.fail("a step was taken"))
        assert ends(make, tmp_path, []) == first


def test_training_goes_on_whatever_the_new_model_and_seed_are(text: torch.Tensor, tmp_path: Path) -> None:
    """A notebook rarely seeds anything: what learns is put back, and so are the random numbers."""
    config = STRATEGIES["open growth"]
    torch.manual_seed(1)
    model = small(2)
    list(train(model, config.strategy(), data_of(text)))
    torch.manual_seed(1)
    killed(lambda: (small(2), config.strategy(), data_of(text)), tmp_path, 20)
    torch.manual_seed(3)
    again = small(2)
    list(train(again, config.strategy(), data_of(text), checkpoints=tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("other", ["rate", "shape", "text", "trunk"])
def test_another_training_is_refused(other: str, text: torch.Tensor, tmp_path: Path) -> None:
    def make(changed: str = "") -> tuple[Any, Any, Data]:
        config = ease.TuneConfig(exits=(1,), lr=1e-3 if changed == "rate" else 3e-3)
        torch.manual_seed(1 if changed == "trunk" else 0)
        model = small(3 if changed == "shape" else 2)
        return model, config.strategy(), data_of(text.flip(0) if changed == "text" else text)

    killed(make, tmp_path)
    model, strategy, data = make(other)
    with pytest.raises(EaseError, match=r"another configuration, model, or text: give another folder") as error:
        list(train(model, strategy, data, checkpoints=tmp_path))
    assert "\n" not in str(error.value)


def flip(path: Path, at: float) -> None:
    """Changes one bit at a share of the file."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.write_bytes(data)


def test_files_are_no_pickles_and_a_phase_without_an_intact_one_is_refused(text: torch.Tensor, tmp_path: Path) -> None:
    make = lambda: (small(2), STRATEGIES["ashem"].strategy(), data_of(text))  # noqa: E731
    killed(make, tmp_path)
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == ["phase-1.previous.safetensors", "phase-1.safetensors"]
    for path in paths:
        path.write_bytes(path.read_bytes()[:2000])
    model, strategy, data = make()
    with pytest.raises(EaseError, match=r"phase-1.previous.safetensors is damaged .*: remove it") as error:
        list(train(model, strategy, data, checkpoints=tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("at", [0.001, 0.2, 0.6, 0.9, 0.9999])
def test_a_damaged_checkpoint_costs_no_more_than_the_steps_since_the_one_before(
    at: float, text: torch.Tensor, tmp_path: Path
) -> None:
    make = lambda: (small(2), STRATEGIES["ashem"].strategy(), data_of(text))  # noqa: E731
    paths = [tmp_path / f"phase-{n}.safetensors" for n in (1, 2)]
    whole = ends(make, None, [])
    with pytest.warns(UserWarning, match="is damaged .*: training resumes from the checkpoint before it") as told:
        again = ends(make, tmp_path, [Killer(18)], lambda: [flip(path, at) for path in paths])
    assert [name for name in whole if whole[name] != again[name]] == []
    assert [str(each.message).split()[0] for each in told] == list(map(str, paths))
    assert ends(make, tmp_path, []) == again


def test_a_kill_while_two_checkpoints_are_exchanged_loses_none(text: torch.Tensor, tmp_path: Path) -> None:
    make = lambda: (small(2), STRATEGIES["ashem"].strategy(), data_of(text))  # noqa: E731
    whole = ends(make, None, [])
    again = ends(make, tmp_path, [Killer(3)], (tmp_path / "phase-1.safetensors").unlink)
    assert [name for name in whole if whole[name] != again[name]] == []


def test_a_kill_while_writing_leaves_the_file_from_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    resume.write_state(path, {"n": 1, "t": [torch.arange(3)], "of": {"x": None, "inf": float("inf")}})
    monkeypatch.setattr(resume.os, "fsync", lambda _: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        resume.write_state(path, {"n": 2})
    state = resume.read_state(path)
    assert state["n"] == 1
    assert state["t"][0].tolist() == [0, 1, 2]
    assert state["of"] == {"x": None, "inf": float("inf")}


def test_saving_takes_a_small_share_of_the_time(
    text: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before a minute has gone by, and later where a saving takes long."""
    clock = [0.0]
    monkeypatch.setattr(resume.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(resume, "EVERY", 60.0)
    monkeypatch.setattr(resume, "write_state", lambda *_: clock.__setitem__(0, clock[0] + 3.0))
    model, device = small(1), torch.device("cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    data = data_of(text)
    kept = Checkpoint(tmp_path / "a", model, optimizer, data.train, data.val, device, "")
    due = lambda after: (clock.__setitem__(0, start + after), kept.due())[1]  # noqa: E731
    start = clock[0]
    assert (due(59), due(60)) == (False, True)
    kept.save()
    start = clock[0]
    assert (due(60), due(149), due(151)) == (False, False, True)
    monkeypatch.setattr(resume, "process", lambda: 1)  # which would be due earlier, since it writes less
    assert not kept.due()
    monkeypatch.undo()
    assert not Checkpoint(None, model, optimizer, data.train, data.val, device, "").due()


# ---------------------------------------------------------------------------------------------------------
# Runs


RECIPE = '''
"""A few steps of everything."""

from ease import ASHEMConfig
from ease.runs import DataConfig, RunConfig, ShapeConfig


def config():
    return RunConfig(
        ASHEMConfig(phase1_layers=1, phase2_layers=2, phase1_max_epochs=2, phase2_max_epochs=2, schedule="cosine"),
        "tiny",
        ShapeConfig(16, 2, dropout=0.1),
        DataConfig("TEXT", "byte", seq_len=16, batch_size=4, epoch_batches=5, eval_batches=3),
        compare=("full-depth", "continued", "standard", "deep-supervision"),
    )
'''


@pytest.fixture(scope="module")
def recipe(text_file: Path) -> str:
    path = text_file.with_name("tiny.py")
    path.write_text(RECIPE.replace("TEXT", text_file.as_posix()))
    return str(path)


@pytest.fixture(scope="module")
def whole(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the recipe that was never killed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EASE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert main(["run", recipe, "--out", str(out)]) == 0
    return out


def same_runs(whole: Path, again: Path) -> None:
    whole_says, again_says = found(whole), found(again)
    assert [key for key in whole_says if whole_says[key] != again_says[key]] == []
    assert CHECKPOINTS not in whole_says["names"]


def found(out: Path) -> dict[str, Any]:
    """What a run's folder says, but for how long it took."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            unlike = {"generation", "memory_bytes", "flops_utilization", "starts", "id"}  # in any two runs
            return {k: timeless(v) for k, v in value.items() if "second" not in k and k not in unlike}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    read = {p.name: json.loads(p.read_text()) for p in out.glob("*.json") if p.name != "tokenizer.json"}
    return timeless(
        {
            "names": sorted(p.name for p in out.iterdir()),
            "weights": (out / "model.safetensors").read_bytes(),
            "metrics": lines,
            **read,
        }
    )


def through(config: RunConfig[Any], out: Path, lives: list[Killer]) -> list[str]:
    said: list[str] = []
    for killer in [*lives, Killer()]:
        with suppress(Killed):
            run(config, out, progress=lambda _, k=killer: k, say=said.append)
            break
    return said


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_a_run_ends_the_same_with_all_its_lines(recipe: str, whole: Path, tmp_path: Path) -> None:
    lives = [Killer(n, at) for n in (7, 11, 6, 9, 13) for at in ("step", "epoch")]
    said = through(load_recipe(recipe).config(), tmp_path / "again", lives)
    assert len(said) > 4
    assert f"resuming the unfinished run in {tmp_path / '.again.partial'}" in said
    same_runs(whole, tmp_path / "again")
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_tuning_goes_on_from_its_checkpoint(recipe: str, whole: Path, tmp_path: Path) -> None:
    tune = ease.TuneConfig(exits=(1,), adapter="mlp", tokens="hard", max_epochs=3)
    config = replace(load_recipe(recipe).config(), strategy=tune, start=str(whole), compare=("full-depth",))
    run(config, tmp_path / "whole")
    through(config, tmp_path / "again", [Killer(3), Killer(0, "epoch"), Killer(2)])
    same_runs(tmp_path / "whole", tmp_path / "again")


COMMAND = """
import os, signal, sys
from ease.cli.main import main
from ease.runs.context import MetricsLog
from ease.training import checkpoint

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it by default
checkpoint.EVERY = 0
left, signum = int(sys.argv[1]), int(sys.argv[2])


def step(self, fraction, metrics=None, step=MetricsLog.step):
    global left
    step(self, fraction, metrics)
    left -= metrics is not None
    if left == 0:
        os.kill(os.getpid(), signum)


MetricsLog.step = step
sys.exit(main(sys.argv[3:]))
"""


def stopped(args: list[str], steps: int, signum: int) -> tuple[int, str]:
    """Runs the command, which is sent a signal in the middle of its training; its exit code and what it said."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(ease.__file__).parents[1])}
    command = [sys.executable, "-c", COMMAND, str(steps), str(int(signum)), *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals as POSIX does")
def test_the_command_goes_on_after_a_real_kill_and_an_interrupt(
    recipe: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["run", recipe, "--out", str(tmp_path / "again")]
    assert stopped(args, 13, signal.SIGKILL)[0] == -signal.SIGKILL
    code, told = stopped(args, 19, signal.SIGINT)
    assert code == 130
    assert told.startswith(f"ease: resuming the unfinished run in {tmp_path / '.again.partial'}\n")
    assert told.endswith(f"ease: interrupted; run the same command again to resume ({tmp_path / '.again.partial'})\n")
    capsys.readouterr()
    assert main(args) == 0
    assert capsys.readouterr().err.count("resuming the unfinished run") == 1
    same_runs(whole, tmp_path / "again")
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, "config.seed"),
        ({"dtype": "float32", "device": "cpu"}, "config.device"),
        ({"strategy": ease.StandardConfig(num_layers=1, max_epochs=1)}, "and more"),
        ({"text": "more"}, "text"),
        ({"code": "new"}, "ease"),
    ],
)
def test_an_unfinished_run_of_another_plan_is_not_reused_and_not_lost(
    change: dict[str, Any],
    says: str,
    recipe: str,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, out, change = tmp_path / "text.txt", tmp_path / "out", dict(change)
    file.write_text(text_file.read_text())
    config = load_recipe(recipe).config()
    config = replace(config, data=replace(config.data, source=str(file)))
    with suppress(Killed):
        run(config, out, progress=lambda _: Killer(3))
    kept = sorted((tmp_path / ".out.partial" / CHECKPOINTS).rglob("*"))
    assert kept
    if change.pop("text", None):
        file.write_text(text_file.read_text() + "more")
    if change.pop("code", None):
        monkeypatch.setattr("ease.runs.runner.__version__", "0.2.0")
    other = replace(config, **change)
    with pytest.raises(
        EaseError, match=rf"\.out\.partial holds an unfinished run that differs in .*{says}.*--overwrite"
    ):
        run(other, out)
    assert sorted((tmp_path / ".out.partial" / CHECKPOINTS).rglob("*")) == kept
    said: list[str] = []
    with suppress(Killed):
        run(other, out, overwrite=True, say=said.append, progress=lambda _: Killer(2))
    assert not [line for line in said if "resuming" in line]
    with suppress(Killed):
        run(other, out, say=said.append, progress=lambda _: Killer(0))
    assert len([line for line in said if "resuming" in line]) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no locks on folders")
def test_a_folder_that_is_being_written_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_folder(out, resumable=True) as folder:
        (folder / "here").touch()
        with pytest.raises(EaseError, match="another process is at work in"), output_folder(out, resumable=True):
            pass
        assert (folder / "here").exists()
    assert sorted(p.name for p in out.iterdir()) == ["here"]


def test_what_was_killed_before_it_saved_leaves_nothing_to_ask_about(
    recipe: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "EVERY", 60.0)
    config = load_recipe(recipe).config()
    with suppress(Killed):
        run(config, tmp_path / "out", progress=lambda _: Killer(3))
    assert list(tmp_path.iterdir()) == []
    stale = tmp_path / ".out.partial"  # of one that had no time to clear away
    stale.mkdir()
    (stale / "metrics.jsonl").write_text("half")
    run(config, tmp_path / "out")
    same_runs(whole, tmp_path / "out")


def test_every_recipe_s_plan_can_be_written(tmp_path: Path) -> None:
    from ease.cli.recipes import recipes

    for name in recipes():
        assert json.loads(json.dumps(asdict(load_recipe(name).config())))
