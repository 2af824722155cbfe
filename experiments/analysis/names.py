"""Names in kept data: earlier names of keys, lines, settings and token groups, and the names in use today.

A kept `test.json` is never rewritten; `current` translates it when it is read. No other module knows earlier names.
"""

from __future__ import annotations

import re
from typing import Any

from experiments.harness.line import CONTINUED, standard_name

KEYS = {
    "plain": "baselines",
    "unfinished": "partial",
    "beside": "compared_with",
    "explained": "by_token_group",
    "original": "ablated",
    "both": "on_validation",
    "leaky": "in_sample",
    "measures": "task_metrics",
}
"""Earlier keys of `test.json`."""
LINES: tuple[tuple[str, str], ...] = (
    (r"^continued\b", CONTINUED),
    (r"\b(\d+) layers, nine tenths", r"standard, \1 layers, before tuning"),
    (r", no head asked", ", classifier exit"),
    (r"^deep supervision, by depth", "deep supervision, weighted by depth"),
    (r"^chosen by chance", "selected at random"),
    (r"^chosen by", "selected by"),
    (r"^copied start", "copied initialization"),
    (r"^random start", "random initialization"),
    (r", brick keeps its loss", ", loss at the exit kept"),
    (r", own head learns", ", untied head trained"),
    (r", own head", ", untied head"),
    (r"^cut after layer", "truncated after layer"),
)
KINDS = {
    "HeadlessConfig": "ClassifierExitsConfig",
    "ChosenConfig": "ASHEMVariantConfig",
    "CutConfig": "TruncatedConfig",
    "WholeConfig": "UnchangedConfig",
}
"""Earlier names of strategies' configurations."""
SETTINGS = {"going_on": "keep", "by": "select_by", "alone": "without_context", "random_start": "random_init"}
VALUES = {("protocol", "seed"): "original", ("by", "chance"): "random", ("freeze", "head learns"): "all but head"}
"""(earlier setting, earlier value) -> value."""
GROUPS = {
    "openness after the token before, bits": "entropy after the token before, bits",
    "place in the sequence": "position in the sequence",
    "part of a word": "place in a word",
}
TITLES = {"ASHEM taken apart": "Ablation of ASHEM"}


def line(name: str) -> str:
    """The current name of a line."""
    if found := re.match(r"plain, layers: (\d+)", name):
        name = standard_name(int(found[1])) + name[found.end() :]
    for old, new in LINES:
        name = re.sub(old, new, name)
    return name


def strategy(config: dict[str, Any]) -> dict[str, Any]:
    """A strategy's configuration with current names."""
    found = {}
    for name, value in config.items():
        if isinstance(value, list):
            value = [strategy(part) if isinstance(part, dict) else part for part in value]
        elif isinstance(value, dict):
            value = strategy(value)
        elif isinstance(value, str):
            value = KINDS.get(value, value) if name == "kind" else VALUES.get((name, value), value)
        found[SETTINGS.get(name, name)] = value
    return found


def entry(kept: dict[str, Any]) -> dict[str, Any]:
    """An entry of `test.json` with current names."""
    points = [
        point | {"groups": [group | {"kind": GROUPS.get(group["kind"], group["kind"])} for group in point["groups"]]}
        if "groups" in point
        else point
        for point in kept["points"]
    ]
    return kept | {"line": line(kept["line"]), "strategy": strategy(kept["strategy"]), "points": points}


def current(data: dict[str, Any]) -> dict[str, Any]:
    """The content of a `test.json` with current names; a file written today is returned as it is."""
    found = {KEYS.get(key, key): value for key, value in data.items()}
    for key in ("base", "ablated", "in_sample"):
        found[key] = found[key] and line(found[key])
    for key in ("baselines", "partial", "compared_with", "by_token_group", "on_validation", "missing"):
        found[key] = [line(name) for name in found[key]]
    for old, new in TITLES.items():
        found["title"] = found["title"].replace(old, new)
    return found | {"entries": [entry(kept) for kept in data["entries"]]}
