"""What the paper takes in: `python -m experiments.paper`, the first half of `make paper`.

Every kept experiment's tables and figure are made anew from its `test.json` somewhere below `docs/data` and laid into
`paper/build/data`, with an index for each place in the paper that shows them. What is not kept has no index, and the
paper says in its place which command makes it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from experiments import cluster, scaling
from experiments.running import write, write_tables
from experiments.tables import notes, tex

ROOT = Path(__file__).resolve().parents[1]
SHOWN = {
    "fronts": ("front", "savings"),
    "tokens": ("tokens",),
    "apart": ("parts", "thresholds", "leak", "last-layer"),
    "costs": ("costs",),
}
"""Place in the paper -> the tables that it shows of every experiment that has them."""
WIDE = ("front", "parts", "costs")
"""Tables that stand sideways."""


def prepare(data: Path, out: Path) -> None:
    """Tables, figures and indexes of all experiments in `data`, which may be missing, into `out`, made anew."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    files = {path.parent.relative_to(data).as_posix(): path for path in data.rglob("test.json")}
    kept = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items()}
    kept = dict(sorted(kept.items(), key=lambda item: (item[1]["lab"]["budget"], item[0])))
    for name, told in kept.items():
        (out / name).mkdir(parents=True)
        write(told, out / name)
        timed = data / name / "last-layer.tex"  # not made from test.json
        if timed.exists():
            shutil.copy(timed, out / name)
    for place, shown in SHOWN.items():
        lines = []
        for name, told in kept.items():
            if bool(told["original"]) == (place == "apart"):  # the parts of ASHEM have a place of their own
                lines += picture(f"{name}/front", told["title"]) if place == "fronts" else []
                lines += [taken(f"{name}/{table}") for table in shown if (out / name / f"{table}.tex").exists()]
        if lines:
            index(out / place, lines)
    stdlib = {n: told for n, told in kept.items() if not told["original"] and "--data stdlib" in told["command"]}
    fronts = [told for name, told in stdlib.items() if "/" not in name]  # others repeat a scale with more seeds
    if len(fronts) > 1:
        (out / "all").mkdir()
        table = scaling.table(fronts, [note for told in fronts for note in notes(told)[:1]])
        write_tables([table], out / "all", table.name)
        scaling.picture(fronts, out / "all" / table.name)
        index(out / table.name, [*picture(f"all/{table.name}", table.title), taken(f"all/{table.name}")])
    write_tables([cluster.table()], out, "cluster")


def index(stem: Path, lines: Sequence[str]) -> None:
    stem.with_suffix(".tex").write_text("\n".join([*lines, r"\clearpage"]) + "\n", encoding="utf-8")


def taken(name: str) -> str:
    command = "wide" if Path(name).name in WIDE else "input"
    return rf"\{command}{{build/data/{name}}}"


def picture(name: str, title: str) -> list[str]:
    """A figure with 95% intervals."""
    start = [r"\begin{figure}", r"\centering", rf"\includegraphics[width=\linewidth]{{build/data/{name}.pdf}}"]
    return [*start, rf"\caption{{{tex(title)}. Bars are 95\% intervals over seeds.}}", r"\end{figure}"]


if __name__ == "__main__":
    prepare(ROOT / "docs" / "data", ROOT / "paper" / "build" / "data")
