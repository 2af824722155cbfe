"""Tables of fronts: differences, noise, choices on validation, and the files they are written to."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from data_front import fake, point

from experiments.analysis import scaling, tables
from experiments.analysis.fronts import Fronts
from experiments.analysis.pages import write
from experiments.harness.candidates import Candidate
from experiments.harness.measuring import front, scored_before


@pytest.mark.parametrize(("lift", "says"), [(-0.02, "-2.0% (-2.0% to -2.0%)"), (0.05, "+5.1% (+5.1% to +5.1%)")])
def test_differences_are_paired_by_seed(lift: float, says: str) -> None:
    (row,) = [row for row in tables.summary(Fronts(fake(lift=lift))).rows if row[0] == "exits & more_"]
    assert row[1] == "exit 1, 50% continue"
    assert row[7] == says


def test_a_difference_within_the_noise_is_marked() -> None:
    noisy = fake(lift=-0.02)
    for entry in noisy["entries"]:
        if entry["line"] == "exits & more_":
            entry["points"][0]["test"]["loss"] += (-0.1, 0.0, 0.12)[entry["seed"]]
    (row,) = [row for row in tables.summary(Fronts(noisy)).rows if row[0] == "exits & more_"]
    assert row[7].endswith(", noise")


def test_lines_are_compared_at_the_same_routing() -> None:
    data = fake()
    for entry in data["entries"]:
        if entry["line"] == "exits & more_":
            entry["points"].insert(0, point(120.0, 5.5, (1,), 0.15))
            data["entries"] = [
                *data["entries"],
                entry | {"line": "variant", "points": copy.deepcopy(entry["points"][1:])},
            ]
    for entry in data["entries"]:
        if entry["line"] == "variant":
            entry["points"][0]["test"]["loss"] += 1.0
    fronts = Fronts(data)
    cheap, half, full = fronts.points["exits & more_"]
    (alone,) = fronts.points["standard 1"]
    found = [fronts.against_line(each, "variant") for each in (cheap, half, full, alone)]
    means = [interval and interval.mean for interval in found]
    assert means[0] is None, "the variant was not measured there"
    assert means[1:3] == pytest.approx([-1.0, 0.0])
    half_continues = fronts.points["variant"][0].mean("loss")
    assert means[3] == pytest.approx(alone.mean("loss") - half_continues), "a line without exits: where half continue"
    assert fronts.against_line(cheap, "standard 1").mean == pytest.approx(cheap.mean("loss") - alone.mean("loss"))  # type: ignore[union-attr]


def test_a_front_is_sorted_by_the_cost_with_each_seed() -> None:
    data = fake(seeds=2)
    for entry in data["entries"]:
        if entry["line"] == "exits & more_" and entry["seed"] == 1:
            entry["points"][0]["test"]["flops_per_token"] = 210.0
    fronts = Fronts(data)
    points = fronts.points["exits & more_"]
    assert [line.x for line in fronts.curves(points)] == [(150.0, 200.0), (200.0, 210.0)]
    assert fronts.curves(points)[1].y == (points[1].metric("loss")[1], points[0].metric("loss")[1])


def test_savings_are_measured_from_the_best_routing() -> None:
    """Full depth worse than the exit does not count as a saving."""
    data = fake()
    for entry in data["entries"]:
        if entry["line"] == "exits & more_":
            entry["points"].insert(0, point(110.0, 4.9, (1,), 0.0))
            entry["points"][1] = point(150.0, 4.2, (1,), 0.5)
    (row,) = tables.savings(Fronts(data)).rows  # type: ignore[union-attr]
    assert row[:2] == ["exits & more_", "exit 1, 50% continue"], "0% is 0.7 nats above the loss at 50%"
    assert row[5:] == ["+0.0% (+0.0% to +0.0%), noise", "+25.0% (+25.0% to +25.0%)"]
    assert tables.savings(Fronts(fake())) is None, "this line needs its full depth"


def test_gains_by_token_group_are_against_the_same_training_without_growth() -> None:
    data = fake() | {"by_token_group": ("exits & more_", "standard 1")}
    for entry in data["entries"]:
        for at in entry["points"]:
            after = 8.0 if entry["line"] == "standard 1" else 10.0
            at["groups"] = [
                {"kind": "place", "group": "first", "share": 1.0, "hard": 0.5, "before": 20.0, "after": after}
            ]
    found = tables.by_token_group(Fronts(data))
    assert found is not None
    assert found.rows == [["place", "first", "100.0%", "50.0%", "20.00", "8.000", "10.00", "+25.0% (+25.0% to +25.0%)"]]


def test_a_line_without_a_learning_rate_is_not_counted() -> None:
    data = fake()
    for entry in data["entries"]:
        if entry["line"] == "exits & more_":
            entry |= {"lr": None, "flops": 1.01 * entry["flops"]}
    about = tables.notes(data)[0]
    assert "Of 3 lines with a learning rate 0 chose the highest and 3 the lowest." in about
    assert "(exits & more_: 101% of it)" in about
    assert "first batches of a split are scored: 2 of validation." in about


def test_choices_do_not_look_at_the_test_split() -> None:
    """A candidate that is good on test but bad on validation is not chosen."""
    data = fake()
    for entry in data["entries"]:
        entry["points"][-1]["test"]["loss"] -= 3.0
    fronts = Fronts(data)
    assert fronts.best("exits & more_").routing == "exit 1, 50% continue"
    for entry in data["entries"]:
        if entry["line"] == "standard 1":
            entry["points"][0]["test"]["loss"] -= 3.0
    assert [each.line for each in Fronts(data).baseline_front] == ["standard 1", "standard 2"]
    rows = [{"sweep": entry["points"], "exits": [1]} for entry in data["entries"] if entry["line"] == "exits & more_"]
    for row in rows:
        worse = copy.deepcopy(row["sweep"][0])
        worse["share"], worse["val"]["loss"], worse["val"]["flops_per_token"] = 0.7, 9.0, 180.0
        row["sweep"] = [row["sweep"][1], row["sweep"][0], worse]
    assert front(rows) == [1, 0], "from cheap to expensive, without what a cheaper one beats"


def test_stored_scores_belong_to_one_model_and_one_hard_set(tmp_path: Path) -> None:
    data = fake(seeds=1)
    for entry in data["entries"]:
        entry["base"] = "base0"
    (tmp_path / "test.json").write_text(json.dumps(data))
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


def test_tables_are_well_formed_and_list_their_configuration(tmp_path: Path) -> None:
    data = fake()
    write(data, tmp_path)
    for table in tables.all_tables(data):
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
    assert "no difference here is known to exceed the noise" in one.markdown()


def test_the_same_data_gives_the_same_files(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(fake(), tmp_path / name)
        made.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert made[0] == made[1]
    assert b"CreationDate" not in made[0]["front.pdf"]
