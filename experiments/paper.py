"""Tables and figures of the paper: `python -m experiments.paper`, the first half of `make paper`.

Every `test.json` below `docs/data` is one experiment. Its tables and figure are written to `paper/build/data`, with one
index file for each place of the paper that shows them; measurements that exist only as Markdown tables are converted. A
place without an index file prints the command that makes its data.

Tables are printed without the notes on their configuration: one table of the paper lists it for all experiments.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.analysis import looks, plots, scaling
from experiments.analysis.fronts import Fronts, OperatingPoint
from experiments.analysis.names import current
from experiments.analysis.statistics import Interval
from experiments.analysis.table import Table, cells_of, difference, percent, tex
from experiments.analysis.tables import all_tables, notes
from experiments.studies import cost_at_1b

ROOT = Path(__file__).resolve().parents[1]
SHOWN = {
    "tables": ("front", "savings"),
    "tokens": ("tokens",),
    "apart": ("parts", "thresholds", "leak", "last-layer"),
    "costs": ("costs",),
}
"""Place in the paper -> the tables of every experiment that it shows."""
MADE = ("setup", "fronts", "distances", "ablation", "recipe", "exits", "measures", "decoding", "scales", "cluster")
"""The other places: figures, tables over all experiments and tables from Markdown."""
COLUMNS = {"front": range(8), "costs": (0, 2, 3, 4, 5, 6)}
"""Table -> its columns that fit on the page; the Markdown tables have all of them."""
EXPLAINED = ("front", "savings", "costs")
"""Tables whose notes are part of the paper's text."""
SEEDS = 3
"""Of an experiment, unless it says otherwise."""
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SCALES = {"bpe": "WikiText-2 in byte pairs", "words": "WikiText-2 in whole words"}
"""Scales whose name is not "scale" and their letters."""


def prepare(data: Path, out: Path) -> None:
    """Writes tables, figures and index files of all experiments in `data` to `out`, which is emptied first."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    files = {path.parent.relative_to(data).as_posix(): path for path in data.rglob("test.json")}
    kept = {name: current(json.loads(path.read_text(encoding="utf-8"))) for name, path in files.items()}
    kept = dict(sorted(kept.items(), key=lambda item: (on_other_data(item[1]), item[1]["lab"]["budget"], item[0])))
    for name, experiment in kept.items():
        (out / name).mkdir(parents=True)
        for table in all_tables(experiment):
            write(printed(table, experiment), out / name)
        plots.front(experiment, out / name / "front")
        timed = data / name / "last-layer.tex"  # not made from test.json
        if timed.exists():
            shutil.copy(timed, out / name)
    whole = {name: experiment for name, experiment in kept.items() if not experiment["ablated"]}
    apart = {name: experiment for name, experiment in kept.items() if experiment["ablated"]}  # the parts of ASHEM
    for place, shown in SHOWN.items():
        of = apart if place == "apart" else whole
        index(out / place, [taken(f"{name}/{t}") for name in of for t in shown if (out / name / f"{t}.tex").exists()])
    several = {name: experiment for name, experiment in whole.items() if len(experiment["seeds"]) > 1}
    figures = []
    for name, experiment in several.items():
        figures += picture(f"{name}/front", marker(experiment), caption(experiment, LATER if figures else KEY))
    index(out / "fronts", figures)
    if kept:
        single(setup(list(kept.values())), out)
    if several:
        single(distances(list(several.values())), out)
    for experiment in list(apart.values())[:1]:
        single(ablation(experiment), out)
    for place, made in KEPT.items():
        if (data / made[0]).exists():
            single(from_markdown(place, (data / made[0]).read_text(encoding="utf-8"), *made[1:]), out)
    stdlib = {name: experiment for name, experiment in whole.items() if not on_other_data(experiment)}
    # In folders of folders are repetitions of a scale with more seeds.
    fronts = [experiment for name, experiment in stdlib.items() if "/" not in name]
    if len(fronts) > 1:
        (out / "all").mkdir()
        table = scaling.table(fronts, ())
        write(compact(table), out / "all")
        scaling.picture(fronts, out / "all" / table.name)
        index(out / table.name, [*picture(f"all/{table.name}", table.name, SCALING), taken(f"all/{table.name}")])
    made = cost_at_1b.table()
    (out / "cluster.md").write_text(made.markdown(), encoding="utf-8")
    single(compact(made), out)


# ---------------------------------------------------------------------------------------------------------
# Files


def index(stem: Path, lines: Sequence[str]) -> None:
    """Writes the index file of a place, if it has anything to show."""
    if lines:
        stem.with_suffix(".tex").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write(table: Table, folder: Path) -> None:
    (folder / f"{table.name}.tex").write_text(signed(table.latex()), encoding="utf-8")


def single(table: Table, out: Path) -> None:
    """Writes a table that is the only one at its place, labelled with the place's name."""
    text = signed(table.latex()).replace(r"\centering", rf"\label{{tab:{table.name}}}" + "\n" + r"\centering", 1)
    (out / f"{table.name}.tex").write_text(text, encoding="utf-8")


def signed(text: str) -> str:
    """LaTeX text in which hyphens before numbers are minus signs."""
    return re.sub(r"(?<=[ (])-(?=\d)", "$-$", text)


def taken(name: str) -> str:
    return rf"\input{{build/data/{name}}}"


def picture(name: str, mark: str, text: str) -> list[str]:
    """LaTeX lines of a figure with its caption and label."""
    start = [r"\begin{figure}", r"\centering", rf"\includegraphics[width=0.94\linewidth]{{build/data/{name}.pdf}}"]
    return [*start, rf"\caption{{{signed(tex(text))}}}\label{{fig:{mark}}}", r"\end{figure}"]


# ---------------------------------------------------------------------------------------------------------
# Text


def compact(table: Table) -> Table:
    """A table with shortened cells."""
    return replace(table, rows=[[short(cell) for cell in row] for row in table.rows])


RANGE = r"\(([-+]?[\d.,]+)%? to ([-+]?[\d.,]+)%?\)"
DIFFERENCE = re.compile(rf"([-+][\d.]+)% {RANGE}(, noise)?")


def short(cell: str) -> str:
    """A cell with its interval as (low, high); a difference loses its per cent signs, and * marks one beyond noise."""
    cell = DIFFERENCE.sub(lambda found: f"{found[1]}{'' if found[4] else '*'} ({found[2]}, {found[3]})", cell)
    return re.sub(RANGE, r"(\1, \2)", cell)


def printed(table: Table, experiment: dict[str, Any]) -> Table:
    """An experiment's table as the paper prints it, without the notes on its configuration."""
    title = re.sub(r"^[^:]*: ", "", table.title)
    own = [] if table.name in EXPLAINED else [note for note in table.notes if note not in notes(experiment)]
    if table.name in COLUMNS:
        left = COLUMNS[table.name]
        rows = [[row[c] for c in left] for row in table.rows]
        table = replace(table, header=[table.header[c] for c in left], rows=rows)
    return compact(replace(table, title=f"{name_of(experiment)}: {title}", notes=own))


def on_other_data(experiment: dict[str, Any]) -> bool:
    """Whether an experiment uses other data than the standard library."""
    return "--data stdlib" not in experiment["command"]


def name_of(experiment: dict[str, Any]) -> str:
    """An experiment's name: its scale and its number of seeds."""
    scale, seeds = experiment["title"].rsplit(" ", 1)[-1], len(experiment["seeds"])
    return (
        f"{SCALES.get(scale, f'scale {scale}').capitalize().replace('ikitext', 'ikiText')}, {in_words(seeds, 'seed')}"
    )


def marker(experiment: dict[str, Any]) -> str:
    """Label of an experiment's figure: its scale and its number of seeds."""
    return f"{experiment['title'].rsplit(' ', 1)[-1]}-{NUMBERS[len(experiment['seeds'])]}"


def in_words(number: int, what: str) -> str:
    return f"{NUMBERS[number] if number < len(NUMBERS) else number} {what}{'' if number == 1 else 's'}"


def caption(experiment: dict[str, Any], key: str) -> str:
    """Caption of an experiment's figure, with `key` as the explanation of its colours."""
    fronts = Fronts(experiment)
    best = min(fronts.strategies, key=lambda name: fronts.gap(fronts.best(name), "val").mean)
    gap = difference(fronts.gap(fronts.best(best))).removesuffix(", noise")
    return (
        f"{name_of(experiment)}, {experiment['lab']['budget']:.0e} training FLOPs for every line: test perplexity "
        f"against counted inference FLOPs (left) and measured time (right). {key} Best on "
        f"validation: {best}, on test at {gap} of perplexity against the baseline front, paired by seed."
    )


KEY = (
    "Lower and further left is better. Black: standard models of every depth, the baseline front through those on it, "
    "and, dotted, the level of the best one. Colours: strategies, each at its routings, from few tokens that continue "
    "past the exit to all; grey: all other strategies. Bars: 95% intervals over seeds."
)
LATER = "Colours and bars as in the first of these figures."
SCALING = (
    "Distance from the baseline front against training FLOPs of a line, three seeds a scale; below zero is better. "
    "Shown are the strategies that are best at the largest scale, ASHEM and phase 1 continued. Lines are least-squares "
    "fits where there are three scales; points are moved sideways so that bars stay apart. Bars: 95% intervals over "
    "seeds, differences paired by seed."
)


# ---------------------------------------------------------------------------------------------------------
# Tables over all experiments


def setup(kept: Sequence[dict[str, Any]]) -> Table:
    """Sizes, budgets, learning rates and number of lines of every experiment."""
    rows = []
    for experiment in kept:
        lab = experiment["lab"]
        rows.append(
            [
                name_of(experiment) + (": ASHEM's components" if experiment["ablated"] else ""),
                f"{lab['tokens']['train']:,}",
                f"{lab['vocab_size']:,}",
                str(lab["dim"]),
                ", ".join(str(re.sub(r"\D+", "", name)) for name in experiment["baselines"]),
                f"{lab['budget']:.1e}",
                ", ".join(f"{lr:g}" for lr in lab["lrs"]),
                str(len({entry["line"] for entry in experiment["entries"]})),
            ]
        )
    header = ["experiment", "training tokens", "vocabulary", "dim", "depths", "FLOPs", "learning rates", "lines"]
    about = (
        "Depths: of the standard models. FLOPs: for training, of every line. Learning rates: each is tried with the "
        "first seed and chosen on validation. Lines: trained with all seeds."
    )
    return Table("setup", "The experiments", header, rows, [about])


def distances(kept: Sequence[dict[str, Any]]) -> Table:
    """Distance of every strategy from the baseline front at every scale, from the experiment with most seeds."""
    scales: dict[str, list[Fronts]] = {}
    for experiment in sorted(kept, key=lambda experiment: -len(experiment["seeds"])):
        scales.setdefault(column(experiment), []).append(Fronts(experiment))
    scales = {scale: scales[scale] for scale in dict.fromkeys(map(column, kept))}
    names = {name for all_fronts in scales.values() for fronts in all_fronts for name in fronts.strategies}
    rows = []
    for name in sorted(names, key=looks.order):
        cells = []
        for all_fronts in scales.values():
            fronts = next((fronts for fronts in all_fronts if name in fronts.points), None)
            five = " †" if fronts and len(fronts.data["seeds"]) > SEEDS else ""
            cells.append(marked(fronts.gap(fronts.best(name))) + five if fronts else "")
        rows.append([name, *cells])
    note = (
        "At the same inference FLOPs and at the routing that validation prefers; negative is better. In brackets: 95% "
        "intervals over three seeds, or over five where † follows, differences paired by seed, not corrected for the "
        "number of rows; * marks those without zero. Empty: not trained there. Classifier exit: its confidence comes "
        "from a linear classifier instead of the head."
    )
    title = "Distance of every strategy from the baseline front, in per cent of test perplexity"
    return Table("distances", title, ["strategy", *scales], rows, [note])


def column(experiment: dict[str, Any]) -> str:
    """Heading of an experiment's column: its scale."""
    return re.sub(r",.*|^Scale (?=\w+,)| in byte pairs", "", name_of(experiment))


def marked(interval: Interval) -> str:
    """A difference in per cent of perplexity with its interval; * marks an interval that excludes zero."""
    if math.isnan(interval.mean):
        return ""
    mean = f"{percent(interval.mean):+.1f}"
    if interval.low is None or interval.high is None:
        return mean
    star = "" if interval.noise else "*"
    return f"{mean}{star} ({percent(interval.low):+.1f}, {percent(interval.high):+.1f})"


def ablation(experiment: dict[str, Any]) -> Table:
    """Variants of ASHEM at the routing where half of the tokens continue, and at full depth."""
    fronts = Fronts(experiment)
    assert fronts.ablated is not None

    def against(point: OperatingPoint, name: str) -> str:
        interval = fronts.against_line(point, name)
        return "" if interval is None or name == point.line else marked(interval)

    rows = []
    for name in fronts.shown:
        half, full = fronts.compared(name), fronts.full_depth(name)
        point = half or full
        versus = [against(point, other) for other in fronts.compared_with]
        mean = f"{math.exp(point.mean('loss')):.3f}"
        rows.append([name, mean, *versus, against(full, fronts.ablated) if half else ""])
    about = (
        "Test perplexity and, in per cent, against other lines (* where the interval over three seeds does not hold "
        "zero). Lines with an exit are at the routing where half of the tokens continue past it, the others at their "
        "only depth; the last column compares full depths. Negative is better."
    )
    header = ["line", "PPL", *(f"vs. {name}" for name in fronts.compared_with)]
    header += [f"vs. {fronts.ablated}, full depth"]
    return Table("ablation", f"{name_of(experiment)}: ASHEM with one part changed at a time", header, rows, [about])


# ---------------------------------------------------------------------------------------------------------
# Measurements kept as Markdown

Row = Sequence[str]
RUNS = {
    "deep-joint": "all layers trained, joint exits",
    "deep-distilled": "frozen layers, exit norms, distilled",
    "deep-tuned": "frozen layers, exit norms, cross entropy",
    "deep-adapter": "frozen layers, adapters, distilled",
}
KEPT: dict[str, tuple[str, str, str, Sequence[str], Sequence[int], Callable[[Row], bool]]] = {
    "recipe": (
        "original-recipe.md",
        "The original recipe on WikiText-2, in-sample and held-out",
        "In-sample: mined, trained and scored on the validation tokens, of which half are hard. Held-out: the same "
        "model on the test split. One seed.",
        ("perplexity", "phase 1", "with phase 2"),
        (0, 1, 2),
        lambda row: True,
    ),
    "exits": (
        "exits.md",
        "Exits added to a finished model of twelve layers (bytes, one seed)",
        "Agree: share of tokens for which the exit predicts what the last layer does. At 95% and at 99%: thresholds "
        "keep that agreement on 64 test sequences; the share of tokens that leave early, inference FLOPs as a share of "
        "full depth without exits, and perplexity are measured on 64 others.",
        ("exits", "after layer", "PPL", "agree", "95%: leave", "FLOPs", "PPL", "99%: leave", "FLOPs", "PPL"),
        range(10),
        lambda row: row[0] in RUNS,
    ),
    "measures": (
        "measures.md",
        "Measures of confidence on the model with joint exits",
        "Cost of one evaluation, in layers and in microseconds a token; area under the ROC curve for agreement with "
        "the last exit at exits after layers 4 and 8; then what thresholds for 99% agreement give on test sequences "
        "that did not choose them (FLOPs as a share of full depth; perplexity, and that of full depth in brackets).",
        ("measure", "layers", "µs", "AUROC, 4", "AUROC, 8", "leave", "FLOPs", "agree", "PPL"),
        range(9),
        lambda row: True,
    ),
    "decoding": (
        "decoding.md",
        "Decoding with the model with joint exits",
        "Greedy, 128 new tokens after 64 of held-out text, two threads. Speed is relative to full-depth decoding with "
        "the same number of rows: median and range over batches. Exact decoding gives the tokens of full depth.",
        ("way", "rows", "tokens/s", "speed", "tokens per pass", "drafts accepted"),
        (0, 1, 2, 3, 5, 6),
        lambda row: True,
    ),
}
"""Place -> file, title, note, header, and the columns and rows of the file's first table that it shows."""


def from_markdown(
    name: str,
    text: str,
    title: str,
    note: str,
    header: Sequence[str],
    columns: Iterable[int],
    selected: Callable[[Row], bool],
) -> Table:
    """A table from the first one of a Markdown page: the given columns of the selected rows."""
    lines = re.search(r"^\|.*?(?=^\s*$|\Z)", text, re.M | re.S)
    assert lines, f"no table for {name}"
    rows = [cells_of(line) for line in lines[0].splitlines()[2:]]
    kept = [[bare(row[c]) if c < len(row) else "" for c in columns] for row in rows if selected(row)]
    return compact(Table(name, title, header, kept, [note]))


def bare(cell: str) -> str:
    return RUNS.get(cell, cell.replace("**", ""))


if __name__ == "__main__":
    prepare(ROOT / "docs" / "data", ROOT / "paper" / "build" / "data")
