"""Earlier names in kept data: translated when read, and gone from everything shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_front import fake

from experiments.analysis.names import current, line, strategy
from experiments.tiers.scales import SCALES
from experiments.tiers.tier1_front import strategies
from experiments.tiers.tier2_ablation import variants

DATA = Path(__file__).resolve().parents[3] / "docs" / "data"


@pytest.mark.parametrize(
    ("earlier", "name"),
    [
        ("plain, layers: 1", "standard, 1 layer"),
        ("plain, layers: 12 (failed)", "standard, 12 layers (failed)"),
        ("continued", "phase 1 continued"),
        ("stacking, with exit, no head asked", "stacking, with exit, classifier exit"),
        ("3 layers, nine tenths", "standard, 3 layers, before tuning"),
        ("ASHEM, own head learns", "ASHEM, untied head trained"),
        ("cut after layer 4", "truncated after layer 4"),
    ],
)
def test_an_earlier_name_has_a_current_one(earlier: str, name: str) -> None:
    assert line(earlier) == name
    assert line(name) == name


def test_settings_are_translated_at_every_depth() -> None:
    earlier = {"kind": "ChosenConfig", "ashem": {"kind": "ASHEMConfig", "protocol": "seed"}, "by": "chance"}
    inner = {"kind": "ASHEMConfig", "protocol": "original"}
    assert strategy(earlier) == {"kind": "ASHEMVariantConfig", "ashem": inner, "select_by": "random"}


def test_current_data_is_left_as_it_is() -> None:
    assert current(fake()) == fake() | {"by_token_group": []}
    kept = json.loads((DATA / "1-s" / "test.json").read_text(encoding="utf-8"))
    assert current(current(kept)) == current(kept)


def test_kept_lines_are_lines_of_today() -> None:
    for path in DATA.rglob("test.json"):
        data = current(json.loads(path.read_text(encoding="utf-8")))
        scale = SCALES[data["title"].rsplit(" ", 1)[-1]]
        known = strategies(scale) | (variants(1, scale.deep, "phase 1", 0.6) if data["ablated"] else {})
        assert {entry["line"] for entry in data["entries"]} <= set(known), path.parent.name
