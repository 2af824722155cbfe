"""`ease reproduce`: the smallest tier end to end and after a kill, what its tables say, what the documents quote."""

from __future__ import annotations

import copy
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import ease
import ease.cli
from ease.cli.main import main
from experiments import reproduce
from experiments.analysis import scaling, tables
from experiments.analysis.fronts import Fronts
from experiments.analysis.statistics import Broken, Fit, Interval, corners, t95
from experiments.harness.candidates import COMPARED, Candidate
from experiments.harness.measuring import front, scored_before
from experiments.harness.running import Settings, write
from experiments.harness.scheduler import Lab, Trial
from experiments.harness.token_groups import kinds
from experiments.tiers import tier2_ablation as ablation

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs" / "data"


# End to end


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """What the smoke tier leaves, after it was killed once."""
    out = tmp_path_factory.mktemp("smoke")
    rows = out / "smoke" / "text.txt-front" / "rows.jsonl"
    args = ["reproduce", "smoke", "--data", str(text_file), "--seeds", "0", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EASE_CACHE", str(out / "cache"))
        process = subprocess.Popen([sys.executable, "-m", "ease", *args], stdout=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while not (rows.exists() and rows.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None
            assert time.monotonic() < until, "nothing was trained"
            time.sleep(0.05)
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        while any(map(running, workers)):
            assert time.monotonic() < until, "a worker outlived the command"
            time.sleep(0.05)
        before = rows.read_bytes()
        assert main(args) == 0
        assert rows.read_bytes().startswith(before)
    return out / "smoke"


def children(pid: int) -> list[int]:
    """The processes that it started, where the system tells."""
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    return list(map(int, tasks.read_text().split())) if tasks.exists() else []


def running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "zombie" not in status.read_text()


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "test.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data(smoke: Path) -> dict[str, Any]:
    return read(smoke / "text.txt-front")


def test_the_smallest_tier_goes_on_after_a_kill_and_ends_with_every_table(smoke: Path) -> None:
    for name in ("text.txt-front", "text.txt-apart"):
        folder = smoke / name
        rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        keys = [row["key"] for row in rows]
        assert len(set(keys)) == len(keys), "every line once"
        assert not [row for row in rows if "failed" in row]
        assert {path.stem for path in (folder / "weights").iterdir()} == set(keys)
        made = read(folder)
        assert made["missing"] == []
        assert {entry["line"] for entry in made["entries"]} == {row["line"] for row in rows}
        for suffix in ("md", "tex", "svg", "pdf"):
            assert (folder / f"front.{suffix}").stat().st_size > 500
        budget = made["lab"]["budget"]
        for entry in made["entries"]:
            if entry["line"] not in made["unfinished"]:
                assert entry["flops"] == pytest.approx(budget, rel=0.2), entry["line"]
    assert (smoke / "text.txt-scales.md").read_text().count("needs 3 scales")
    assert {path.stem for path in (smoke / "text.txt-apart").glob("*.tex")} >= {"parts", "leak", "last-layer", "tokens"}


def test_a_second_run_trains_nothing_and_scores_no_test_token_again(
    smoke: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EASE_CACHE", str(smoke.parent / "cache"))
    before = {path: path.read_bytes() for path in smoke.rglob("*.*") if path.suffix in (".json", ".jsonl", ".md")}
    args = ["reproduce", "smoke", "--data", str(text_file), "--seeds", "0", "--out", str(smoke.parent)]
    assert main(args) == 0
    assert "test split" not in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before


def test_every_strategy_is_among_the_rivals(data: dict[str, Any]) -> None:
    kinds_ = {entry["strategy"]["kind"] for entry in data["entries"]}
    assert kinds_ == {config.__name__ for config in ease.STRATEGIES.values()} | {"HeadlessConfig"}


def test_a_token_that_stays_pays_no_head_where_none_is_asked(data: dict[str, Any]) -> None:
    places = Fronts(data).places
    half = {name: next(p for p in places[name] if p.candidate.share == COMPARED) for name in places if "early" in name}
    asked, unasked = half["early exit"], half["early exit, no head asked"]
    full = Fronts(data).full_depth("early exit")
    assert full.figure("loss") == Fronts(data).full_depth("early exit, no head asked").figure("loss"), "one model"
    lab = data["lab"]
    # On validation half of the tokens go on, give or take ties: that is how many heads are saved.
    saved = asked.mean("flops_per_token", "val") - unasked.mean("flops_per_token", "val")
    assert saved == pytest.approx(0.5 * 2 * lab["dim"] * lab["vocab_size"], rel=0.25)


def test_the_leak_is_seen_and_kept_apart(smoke: Path) -> None:
    made = read(smoke / "text.txt-apart")
    (leaky,) = [entry for entry in made["entries"] if entry["line"] == made["leaky"]]
    assert leaky["strategy"]["protocol"] == "seed"
    assert all("hard_ppl" in point["val"] for point in leaky["points"])
    by_name = {table.name: table for table in tables.all_tables(made)}
    assert {name for name, table in by_name.items() if made["leaky"] in str(table.rows)} == {"leak", "costs"}


def test_a_budget_that_is_used_up_begins_nothing_and_says_what_is_missing(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    told: list[str] = []
    settings = Settings(tmp_path, (0,), minutes=1e-9, say=told.append)
    missing = reproduce.reproduce("1", str(text_file), ("tiny",), settings)
    assert [name.split(": ", 1)[1] for name in missing] == list(reproduce.rivals(reproduce.SCALES["tiny"]))
    assert not list(tmp_path.rglob("rows.jsonl"))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["4"], "unknown tier '4': use smoke, 1, 2, 3"),
        (["1", "--seeds", "a,b"], "seeds are numbers"),
        (["1", "--seeds", "1,1"], "each once"),
        (["1", "--budget", "0"], "more than 0"),
        (["1", "--jobs", "0"], "at least one"),
        (["1", "--scales", "huge"], "unknown scale 'huge'"),
        (["1", "--scales", "tiny", "--data", "no/such/folder"], "no data"),
        (["smoke", "--device", "abacus"], "no device"),
    ],
)
def test_bad_input_is_one_sentence(args: list[str], says: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *args]) == 2
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_a_checkout_there_is_one_sentence(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(ease.cli, "__file__", str(tmp_path / "lib" / "site-packages" / "ease" / "cli.py"))
    assert main(["reproduce", "smoke"]) == 2
    assert "clone the repository" in capsys.readouterr().err


# What is said of the figures


def test_intervals_are_students() -> None:
    # Two-sided 95% quantiles, from the tables of any textbook.
    for df, value in {1: 12.706, 2: 4.303, 3: 3.182, 9: 2.262, 30: 2.042, 120: 1.980}.items():
        assert t95(df) == pytest.approx(value, abs=6e-4)
    found = Interval.of([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high == pytest.approx(2 + 4.303 / math.sqrt(3), abs=1e-3)
    assert not Interval.of([1.0, 1.1, 0.9]).noise
    assert Interval.of([1.0, -1.1, 0.9]).noise
    assert Interval.of([1.0]) == Interval(1.0)
    assert Interval.of([1.0]).noise, "one seed says nothing of the noise"


def test_the_line_to_beat_is_what_mixing_plain_models_reaches() -> None:
    points = [(1.0, 5.0), (2.0, 4.5), (3.0, 3.0), (4.0, 3.5)]
    assert corners(points) == [0, 2], "the second lies above the line, the last is dearer and worse"
    assert corners([(1.0, 5.0), (2.0, 3.5), (3.0, 3.0)]) == [0, 1, 2]
    line = Broken((1.0, 3.0), (5.0, 3.0))
    assert [line.at(x) for x in (1.0, 2.0, 9.0)] == [5.0, 4.0, 3.0]
    assert math.isnan(line.at(0.5)), "left of every plain model there is nothing to compare with"


def test_a_fit_finds_a_line_and_is_sure_of_it_only_where_points_are() -> None:
    fit = Fit.of([0, 0, 1, 1, 2, 2], [0.1, -0.1, 1.1, 0.9, 2.1, 1.9])
    assert fit.slope.mean == pytest.approx(1.0)
    near, far = fit.at(1.0), fit.at(50.0)
    assert near.mean == pytest.approx(1.0)
    assert far.mean == pytest.approx(50.0)
    assert far.high - far.low > 10 * (near.high - near.low) > 0


def point(cost: float, loss: float, exits: tuple[int, ...] = (), share: float | None = None) -> dict[str, Any]:
    told = {"loss": loss, "ppl": math.exp(loss), "hard_ppl": math.exp(loss + 1), "flops_per_token": cost}
    told |= {"compute_cost": 0.5, "shallow_ratio": 0.5, "acc": 0.5, "easy_ppl": 2.0}
    where = {"exits": list(exits), "share": share, "threshold": None, "thresholds": [0.5] * len(exits)}
    return where | {"val": dict(told), "test": told}


def fake(seeds: int = 3, lift: float = 0.0, budget: float = 1e12) -> dict[str, Any]:
    """Plain models of 1 and 2 layers, and a strategy half-way between that is `lift` above their line."""
    entries = []
    for seed in range(seeds):
        noise = 0.3 * seed  # of the seed, the same for all lines
        half = [point(150.0, 4.5 + lift + noise, (1,), 0.5), point(200.0, 4.4 + noise)]
        for name, points in {
            "base": [point(100.0, 6.0 + noise)],
            "plain 1": [point(100.0, 5.0 + noise)],
            "plain 2": [point(200.0, 4.0 + noise)],
            "exits & more_": half,
        }.items():
            entries.append(
                {
                    "key": f"{name}{seed}",
                    "line": name,
                    "seed": seed,
                    "lr": 0.01,
                    "points": points,
                    "flops": budget,
                    "seconds": 1.0,
                    "memory": 2**20,
                    "strategy": {"kind": "StandardConfig"},
                }
            )
    lab = {"corpus": "text", "tokens": {"train": 10}, "vocab_size": 9, "dim": 8, "heads": 2, "seq": 4, "batch": 2}
    lab |= {"tie_embeddings": True, "dropout": 0.0, "budget": budget, "lrs": [0.01, 0.02], "eval_batches": [2, None]}
    about = {"cpu": "a CPU", "device": "cpu", "torch": "2", "python": "3"}
    told = {"title": "Trial", "command": "ease reproduce 1", "lab": lab, "seeds": list(range(seeds))}
    told |= {"machine": about, "timed": {"seed": 0, "rounds": 5, "batches": 4}, "base": "base", "beside": ["plain 1"]}
    told |= {"plain": ["plain 1", "plain 2"], "unfinished": ["base"], "original": None, "both": [], "leaky": None}
    return told | {"explained": (), "missing": ["another"], "entries": entries}


@pytest.mark.parametrize(("lift", "says"), [(-0.02, "-2.0% (-2.0% to -2.0%)"), (0.05, "+5.1% (+5.1% to +5.1%)")])
def test_differences_are_paired_by_seed(lift: float, says: str) -> None:
    (row,) = [row for row in tables.summary(Fronts(fake(lift=lift))).rows if row[0] == "exits & more_"]
    assert row[1] == "exit 1, 50% go on"
    assert row[7] == says


def test_what_lies_inside_the_noise_is_called_that() -> None:
    noisy = fake(lift=-0.02)
    for entry in noisy["entries"]:
        if entry["line"] == "exits & more_":
            entry["points"][0]["test"]["loss"] += (-0.1, 0.0, 0.12)[entry["seed"]]
    (row,) = [row for row in tables.summary(Fronts(noisy)).rows if row[0] == "exits & more_"]
    assert row[7].endswith(", noise")


def test_lines_are_compared_where_they_are_routed_alike() -> None:
    told = fake()
    for entry in told["entries"]:
        if entry["line"] == "exits & more_":
            entry["points"].insert(0, point(120.0, 5.5, (1,), 0.15))
            told["entries"] = [
                *told["entries"],
                entry | {"line": "variant", "points": copy.deepcopy(entry["points"][1:])},
            ]
    for entry in told["entries"]:
        if entry["line"] == "variant":
            entry["points"][0]["test"]["loss"] += 1.0
    fronts = Fronts(told)
    cheap, half, full = fronts.places["exits & more_"]
    (alone,) = fronts.places["plain 1"]
    means = [(found := fronts.beside(place, "variant")) and found.mean for place in (cheap, half, full, alone)]
    assert means[0] is None, "the variant was not measured there"
    assert means[1:3] == pytest.approx([-1.0, 0.0])
    half_goes_on = fronts.places["variant"][0].mean("loss")
    assert means[3] == pytest.approx(alone.mean("loss") - half_goes_on), "a line without exits: where half go on"
    assert fronts.beside(cheap, "plain 1").mean == pytest.approx(cheap.mean("loss") - alone.mean("loss"))  # type: ignore[union-attr]


def test_a_front_is_in_order_of_what_it_costs_with_each_seed() -> None:
    told = fake(seeds=2)
    for entry in told["entries"]:
        if entry["line"] == "exits & more_" and entry["seed"] == 1:
            entry["points"][0]["test"]["flops_per_token"] = 210.0
    fronts = Fronts(told)
    places = fronts.places["exits & more_"]
    assert [line.x for line in fronts.broken(places)] == [(150.0, 200.0), (200.0, 210.0)]
    assert fronts.broken(places)[1].y == (places[1].figure("loss")[1], places[0].figure("loss")[1])


def test_savings_are_measured_from_the_best_routing() -> None:
    """A line whose full depth is worse than its exit saves nothing but its own harm."""
    told = fake()
    for entry in told["entries"]:
        if entry["line"] == "exits & more_":
            entry["points"].insert(0, point(110.0, 4.9, (1,), 0.0))
            entry["points"][1] = point(150.0, 4.2, (1,), 0.5)
    (row,) = tables.savings(Fronts(told)).rows  # type: ignore[union-attr]
    assert row[:2] == ["exits & more_", "exit 1, 50% go on"], "0% go on is 0.7 nats above what half reaches"
    assert row[5:] == ["+0.0% (+0.0% to +0.0%), noise", "+25.0% (+25.0% to +25.0%)"]
    assert tables.savings(Fronts(fake())) is None, "this line needs its full depth"


def test_gains_of_tokens_are_shown_beside_the_same_training_without_growth() -> None:
    told = fake() | {"explained": ("exits & more_", "plain 1")}
    for entry in told["entries"]:
        for at in entry["points"]:
            after = 8.0 if entry["line"] == "plain 1" else 10.0
            at["groups"] = [
                {"kind": "place", "group": "first", "share": 1.0, "hard": 0.5, "before": 20.0, "after": after}
            ]
    found = tables.explained(Fronts(told))
    assert found is not None
    assert found.rows == [["place", "first", "100.0%", "50.0%", "20.00", "8.000", "10.00", "+25.0% (+25.0% to +25.0%)"]]


def test_a_line_without_a_rate_chose_none() -> None:
    told = fake()
    for entry in told["entries"]:
        if entry["line"] == "exits & more_":
            entry |= {"lr": None, "flops": 1.01 * entry["flops"]}
    about = tables.notes(told)[0]
    assert "Of 3 lines with a rate 0 chose the highest and 3 the lowest." in about
    assert "(exits & more_: 101% of it)" in about
    assert "first batches of a split: 2 of validation." in about


def test_choices_do_not_look_at_the_test_split() -> None:
    """A candidate that shines on test and fails on validation stands for nothing."""
    told = fake()
    for entry in told["entries"]:
        entry["points"][-1]["test"]["loss"] -= 3.0
    fronts = Fronts(told)
    assert fronts.best("exits & more_").routing == "exit 1, 50% go on"
    for entry in told["entries"]:
        if entry["line"] == "plain 1":
            entry["points"][0]["test"]["loss"] -= 3.0
    assert [place.line for place in Fronts(told).corners] == ["plain 1", "plain 2"]
    rows = [{"sweep": entry["points"], "exits": [1]} for entry in told["entries"] if entry["line"] == "exits & more_"]
    for row in rows:
        worse = copy.deepcopy(row["sweep"][0])
        worse["share"], worse["val"]["loss"], worse["val"]["flops_per_token"] = 0.7, 9.0, 180.0
        row["sweep"] = [row["sweep"][1], row["sweep"][0], worse]
    assert front(rows) == [1, 0], "from cheap to dear, without what a cheaper one beats"


def test_what_was_scored_holds_for_one_model_and_one_hard_set(tmp_path: Path) -> None:
    told = fake(seeds=1)
    for entry in told["entries"]:
        entry["base"] = "base0"
    (tmp_path / "test.json").write_text(json.dumps(told))
    (kept,) = [keys for keys in scored_before(tmp_path / "test.json") if keys[2].share == 0.5]
    assert kept == ("exits & more_0", "base0", Candidate((1,), 0.5))
    assert scored_before(tmp_path / "none.json") == {}


def test_three_scales_are_fitted_and_two_are_not() -> None:
    three = [fake(lift=0.02 * at, budget=10.0 ** (12 + at)) for at in range(3)]
    fitted = scaling.table(three, [])
    (row,) = fitted.rows
    assert row[:4] == [
        "exits & more_",
        "+0.0% (+0.0% to +0.0%), noise",
        "+2.0% (+2.0% to +2.0%)",
        "+4.1% (+4.1% to +4.1%)",
    ]
    assert row[4].startswith("+2.0%")
    assert "decades beyond" in " ".join(fitted.notes)
    unsure = scaling.table(three[:2], [])
    assert unsure.rows[0][-2:] == ["none", "none"]
    assert "needs 3 scales, and 2 are done" in " ".join(unsure.notes)


def test_tables_are_well_formed_and_say_what_is_behind_them(tmp_path: Path) -> None:
    told = fake()
    write(told, tmp_path)
    for table in tables.all_tables(told):
        lines = table.markdown().splitlines()
        rows = [line for line in lines if line.startswith("|")]
        assert len({line.count("|") for line in rows}) == 1
        latex = table.latex()
        for opened, closed in ((r"\begin{table}", r"\end{table}"), (r"\begin{tabular}", r"\end{tabular}"), ("{", "}")):
            count = [len(re.findall(rf"(?<!\\){re.escape(mark)}", latex)) for mark in (opened, closed)]
            assert count[0] == count[1] > 0
        inside = latex.split(r"\hline")[1:-1]
        cells = [len(re.findall(r"(?<!\\)&", row)) for part in inside for row in part.strip().splitlines()]
        assert set(cells) == {len(table.header) - 1}
        assert not re.search(r"(?<!\\)[%#_](?!\n)", latex.replace("{%\n", "{\n")), "special characters are escaped"
        for source in (table.markdown(), latex):
            assert "seeds 0, 1, 2" in source
            assert "1e+12 training FLOPs" in source
            assert "ease reproduce 1" in source
            assert "a CPU" in source
            assert "Not trained yet: another" in source
    assert r"exits \& more\_" in (tmp_path / "front.tex").read_text()
    one = tables.summary(Fronts(fake(seeds=1)))
    assert "nothing here is known to lie outside the noise" in one.markdown()


def test_the_same_figures_make_the_same_files(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(fake(), tmp_path / name)
        made.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert made[0] == made[1]
    assert b"CreationDate" not in made[0]["front.pdf"]


# What makes a token hard


def test_tokens_are_grouped_by_what_they_are() -> None:
    text = "ab ab ab cab " * 20
    ids = torch.tensor([ord(c) - 97 if c != " " else 3 for c in text])
    lab = Lab({"train": ids, "val": ids, "test": ids}, "", 4, 1, 2, 1.0, (1.0,), 8, 8, 2, pieces=("a", "b", "c", " "))
    found = kinds(lab)
    names, part = found["part of a word"]
    shown = [names[i] for i in part[:11].tolist()]  # of what follows the first letter
    word = ["inside a word", "no word", "start of a word"]
    assert shown == [*word * 3, "inside a word", "inside a word"]
    names, group = found["openness after the token before, bits"]
    assert set(group.tolist()) == {0}, "at most two letters follow any other"
    rarity = {names[i] for names, group in [found["rarity of the token, bits"]] for i in group.tolist()}
    assert rarity == {"below 2", "2 to 4"}


# The parts of ASHEM


@pytest.fixture
def trial(text: torch.Tensor) -> Trial:
    half = len(text) // 2
    splits = {"train": text[:half], "val": text[half:], "test": text[half:]}
    sizes = {"brick": 1, "depth": 2, "budget": 1e9, "lrs": (1e-2,), "dim": 16, "seq": 16, "batch": 8}
    lab = Lab(splits, "", 256, **sizes, epoch_batches=4, eval_batches=(2, 2), tie_embeddings=False)  # type: ignore[arg-type]
    return Trial(lab, 0, 1e-2, 3e8)


def phase_of(trial: Trial, **settings: Any) -> tuple[ease.Phase, ease.StandardTransformer, ease.StandardTransformer]:
    torch.manual_seed(0)
    model = trial.lab.model(1)
    model.trained_exits = {1}
    before = copy.deepcopy(model)
    config = ablation.chosen(2, **settings)(trial)
    phase = config.strategy().next_phase(model, ease.Data(trial.lab.train(0), trial.lab.val))
    assert phase is not None
    return phase, model, before


def hard_of(phase: ease.Phase) -> torch.Tensor:
    return torch.cat([batch.scored.flatten() for batch in phase.train.batches])


def test_half_of_the_tokens_are_hard_however_they_are_chosen(trial: Trial) -> None:
    reference = trial.lab.model(2)
    found = {}
    for by in ("confidence", "loss", "gain", "chance"):
        phase, _model, before = phase_of(trial._replace(reference=reference), by=by)
        found[by] = hard_of(phase)
        assert found[by].double().mean() == pytest.approx(0.5, abs=0.02)
    batches = phase.train.batches
    scores = ease.score(before, [batch._replace(active=None, state=None) for batch in batches])
    assert scores.losses[found["loss"]].min() >= scores.losses[~found["loss"]].max() - 1e-5
    gain = scores.losses - ease.score(reference, [b._replace(active=None, state=None) for b in batches]).losses
    assert gain[found["gain"]].min() >= gain[~found["gain"]].max() - 1e-5
    assert len({tuple(hard.tolist()) for hard in found.values()}) == 4
    plain, gained = (phase_of(trial._replace(reference=reference), by=by)[0].spent for by in ("loss", "gain"))
    assert gained["mining"] > plain["mining"], "the reference's passes are counted"


def test_what_is_frozen_stays_and_what_is_open_moves(trial: Trial) -> None:
    for freeze, moves in (("all", set()), ("head learns", {"head"}), ("nothing", {"head", "brick"})):
        phase, model, before = phase_of(trial, freeze=freeze)
        ease.Trainer(phase.config, 256).run(model, phase)
        moved = {"head": "output_head.weight", "brick": "layers.0.ffn.down_proj.weight"}
        found = {
            part for part, name in moved.items() if not torch.equal(model.state_dict()[name], before.state_dict()[name])
        }
        assert found == moves


def test_tokens_without_context_and_a_random_start(trial: Trial) -> None:
    phase, _, _ = phase_of(trial, alone=True)
    whole, _, _ = phase_of(trial)
    assert {batch.x.shape[1] for batch in phase.train} == {1}
    assert sum(len(batch.x) for batch in phase.train) == int(hard_of(whole).sum())
    ids = torch.randint(256, (1, 8))
    for random_start in (False, True):
        _, model, before = phase_of(trial, random_start=random_start)
        assert torch.equal(model(ids), before(ids)) != random_start
        assert torch.equal(model.forward_to_layer(ids, 1), before.forward_to_layer(ids, 1))


# What the documents quote

BLOCK = re.compile(r"<!-- from (\S+) -->\n(.*?)<!-- end -->", re.S)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def strangers(page: str, root: Path) -> list[str]:
    """The numbers in a page's generated blocks that the file named there does not hold."""
    return [
        number
        for source, block in BLOCK.findall(page)
        for number in set(NUMBER.findall(block)) - set(NUMBER.findall((root / source).read_text(encoding="utf-8")))
    ]


def test_a_number_that_no_data_holds_is_found(tmp_path: Path) -> None:
    (tmp_path / "front.md").write_text("| ASHEM | 4.71 (4.61 to 4.80) | 1,234k |")
    page = "<!-- from front.md -->\n| ASHEM | {} |\n<!-- end -->\nelsewhere 99"
    assert strangers(page.format("4.71, 1,234k"), tmp_path) == []
    assert strangers(page.format("4.72"), tmp_path) == ["4.72"]


@pytest.mark.parametrize(
    "page",
    sorted({ROOT / "README.md", *(ROOT / "docs").rglob("*.md")} - set(DATA.rglob("*.md"))),
    ids=lambda page: page.name,
)
def test_documents_quote_generated_figures_only(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- from ") == len(BLOCK.findall(text)), "every block ends with <!-- end -->"
    assert strangers(text, ROOT) == []


MEASURED = re.compile(r"(?<![\w.,])\d[\d,]*(?:\.\d+(?:e\d+|%|k)?|e\d+|%|k\b)(?!\.?\d)")
"""What only a measurement or a count can say: a number with a point, in per cent, in thousands or with an exponent."""


def unfounded(page: str, root: Path) -> list[str]:
    """The measured numbers in a page's prose that neither the data its section names nor its commands hold.

    A paragraph or an item that says "by hand" is of figures that no command makes.
    """
    found = []
    for section in re.split(r"(?m)^## ", page):
        sources = {
            *re.findall(r"<!-- from docs/(\S+) -->", section),
            *re.findall(r"\]\((?:\.\./)?(data/[^)]+\.md)\)", section),
        }
        commands = "\n".join(re.findall(r"(?m)^    .*|`[^`]*`", section))
        held = commands + "".join((root / "docs" / source).read_text(encoding="utf-8") for source in sources)
        prose = re.sub(r"(?m)^    .*|`[^`]*`|\]\([^)]*\)|^\|.*|<!--.*?-->", "", BLOCK.sub("", section))
        for paragraph in re.split(r"\n\s*\n|\n(?=- )", prose):
            if "by hand" not in " ".join(paragraph.lower().split()):
                found += [
                    n
                    for n in MEASURED.findall(paragraph)
                    if not re.search(rf"(?<![\d.]){re.escape(n)}(?!\d|\.\d)", held)
                ]
    return found


def test_prose_without_data_is_found(tmp_path: Path) -> None:
    (tmp_path / "docs" / "data").mkdir(parents=True)
    (tmp_path / "docs" / "data" / "x.md").write_text("| ASHEM | 4.71 | 12.5% | 143.2k |")
    page = "# R\n\n## A\n\n    do --lr 0.02\n\n{}, see [all](data/x.md).\n"
    assert unfounded(page.format("4.71 at 0.02 and 12.5%, 143.2k, 3 seeds"), tmp_path) == []
    assert unfounded(page.format("4.7 at 13%"), tmp_path) == ["4.7", "13%"]
    assert unfounded(page.format("- worked out by\nhand: 4.7\n- and 2.5%"), tmp_path) == ["2.5%"]
    assert unfounded(page + "\n## B\n\n4.71\n", tmp_path) == ["4.71"], "each section names its data"


@pytest.mark.parametrize("name", ["results", "results-appendix", "what-did-not-work"])
def test_results_say_no_number_that_no_data_holds(name: str) -> None:
    page = (ROOT / "docs" / "research" / f"{name}.md").read_text(encoding="utf-8")
    assert unfounded(page, ROOT) == []
    assert name != "results" or "by hand" not in page.lower(), "the summary has no number without a command"
    outside = BLOCK.sub("", page)
    assert not re.findall(r"(?m)^\|.*", outside), "every table stands in a block that names its data"


@pytest.mark.parametrize("path", sorted(DATA.rglob("test.json")), ids=lambda path: path.parent.name)
def test_kept_tables_are_what_kept_figures_make(path: Path, tmp_path: Path) -> None:
    write(json.loads(path.read_text(encoding="utf-8")), tmp_path)
    for made in tmp_path.iterdir():
        kept = path.parent / made.name
        if made.suffix in (".md", ".tex") and kept.exists():
            assert kept.read_text(encoding="utf-8") == made.read_text(encoding="utf-8")
