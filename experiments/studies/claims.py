"""The claims of the original experiment beside what the kept results say about them.

python -m experiments.studies.claims OUT [DATA]

DATA holds the results, docs/data by default. Nothing is trained.
"""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.analysis.table import Table, cells_of, write_tables

Row = dict[str, str]

NAMES = {"PPL": "test PPL", "hard PPL": "hard PPL"}  # columns of the test split in the tables of fronts


def rows(path: Path) -> dict[tuple[str, str], Row]:
    """The rows of all tables of a page, by line and routing; a later table adds columns and does not replace any."""
    found: dict[tuple[str, str], Row] = {}
    header: list[str] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        cells = cells_of(text) if text.startswith("|") else []
        if not cells:
            header = []
        elif not header:
            header = cells
        elif "routing" in header and not set(text) <= set("|- "):
            row = dict(zip(header, cells, strict=True))
            for name, value in row.items():
                found.setdefault((row["line"], row["routing"]), {}).setdefault(name, value)
    return found


def number(cell: str) -> float:
    """The mean in a cell such as `5.066 (4.770 to 5.381)` or `143.2k`."""
    first = cell.split()[0].replace(",", "")
    return 1000 * float(first[:-1]) if first.endswith("k") else float(first)


def main(out: str, data: str = "docs/data") -> None:
    own, parts, memory = (rows(Path(data, name, "front.md")) for name in ("1-s", "2-s", "1-s-memory"))
    full, half = "full depth", "exit 1, 50% continue"
    before = parts["phase 1, untied head", full]
    original = parts["original recipe, in-sample", half]
    first, continued, ashem = own["phase 1", full], own["phase 1 continued", full], own["ASHEM", half]
    brick = memory["memory, ASHEM on brick 0", "exit 0, 0% continue"]
    on_brick = memory["memory, ASHEM on brick 0", "exit 0, 50% continue"]

    def change(a: Row, b: Row, column: str) -> str:
        x, y = number(a[column]), number(b[column])
        return f"{y / x - 1:+.1%} ({a[column].split()[0]} to {b[column].split()[0]})"

    def changes(what: str) -> list[str]:
        recipe = [change(before, original, f"{split}{what}") for split in ("validation ", "test ")]
        return [*recipe, change(first, ashem, NAMES[what]), change(brick, on_brick, NAMES[what])]

    def compute(row: Row, deepest: Row) -> str:
        return f"{number(row['FLOPs/token']) / number(deepest['FLOPs/token']):.1%}"

    table = [
        ["all tokens, against phase 1", "-15.9%", *changes("PPL")],
        ["all tokens, against phase 1 continued", "-15.9%", "", "", change(continued, ashem, "test PPL"), ""],
        ["hard tokens, against phase 1", "-38.1% (981 to 607)", *changes("hard PPL")],
        ["hard tokens, against phase 1 continued", "", "", "", change(continued, ashem, "hard PPL"), ""],
        [
            "FLOPs per token, of full depth",
            "64.82%",
            *2 * [""],
            compute(ashem, own["standard, 3 layers", full]),
            compute(on_brick, memory["memory, standard, 2 layers", full]),
        ],
        [
            "against standard models at the same FLOPs",
            "",
            "",
            "",
            ashem["against the baseline front"].split(" (")[0],
            on_brick["against the baseline front"],
        ],
        [
            "against standard models with the same memory",
            *4 * [""],
            on_brick["against the front with a memory"],
        ],
    ]
    notes = [
        "The figures of the original are those that its implementation reports, on the tokens that it trained on. All "
        "other columns, the original recipe included, are of scale s on Python's standard library: a smaller model and "
        "another text. The last column has one seed, the others three.",
        "Made by `python -m experiments.studies.claims OUT` from docs/data: 2-s (original recipe), 1-s (held-out "
        "ASHEM, half of the tokens continue), 1-s-memory (ASHEM on brick 0).",
    ]
    header = ["claim", "original", "in-sample, original recipe", "held-out, original recipe"]
    header += ["held-out, ASHEM", "held-out, ASHEM on brick 0"]
    write_tables([Table("claims", "The claims of the original experiment", header, table, notes)], Path(out), "claims")


if __name__ == "__main__":
    main(*sys.argv[1:])
