"""Tables and figures of the paper: `python -m experiments.paper`, the first half of `make paper`.

Every kept experiment's tables and figure are made anew from its `test.json` somewhere below `docs/data` and written to
`paper/build/data`, with an index for each place in the paper that shows them; measurements that are kept as Markdown
tables are read from there. What is not kept has no index, and the paper says in its place which command makes it.

The paper prints a table without the configuration behind it, which one table at the start of its experiments lists.
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

from experiments.analysis import plots as draw
from experiments.analysis import scaling
from experiments.analysis.fronts import Fronts, Place
from experiments.analysis.statistics import Interval
from experiments.analysis.tables import Table, all_tables, notes, percent, tex
from experiments.harness.candidates import COMPARED
from experiments.studies import cost_at_1b as cluster

ROOT = Path(__file__).resolve().parents[1]
SHOWN = {
    "tables": ("front", "savings"),
    "tokens": ("tokens",),
    "apart": ("parts", "thresholds", "leak", "last-layer"),
    "costs": ("costs",),
}
"""Place in the paper -> the tables that it shows of every experiment that has them."""
MADE = ("setup", "fronts", "distances", "ablation", "recipe", "exits", "measures", "decoding", "scales", "cluster")
"""The other places: a figure of every experiment, and tables over all of them or from Markdown."""
COLUMNS = {"front": range(8), "costs": (0, 2, 3, 4, 5, 6)}
"""Of tables too wide for the page, the columns that are printed: the rest is in the Markdown tables."""
EXPLAINED = ("front", "savings", "costs")
"""Tables whose notes are in the text, once for all experiments."""
LEAST = 3
"""Seeds of most experiments."""
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SCALES = {"bpe": "WikiText-2 in byte pairs", "words": "WikiText-2 in whole words"}
"""Scale -> its name, where that is not "scale" and its letters."""
WORDS = (
    (r"plain, layers: 1\b", "standard, 1 layer"),
    (r"plain, layers: (\d+)", r"standard, \1 layers"),
    (r"\bcontinued\b", "phase 1 continued"),
    (r"against phase 1 phase 1", "against phase 1"),
    (r"\bgo on\b", "continue"),
    (r"\bgoes on from\b", "starts from"),
    (r", no head asked", ", classifier exit"),
    (r"\bcorner\b", "on the front"),
    (r"plain models of the same training FLOPs", "standard models of the same training FLOPs"),
    (r"the straight line, in FLOPs per token and loss, between the standard", "the baseline front of the standard"),
    (r"against plain models", "against the front"),
    (r"from plain models", "from the baseline front"),
    (r"\bplain models\b", "standard models"),
    (r"every strategy where it stands best against the front", "every line at the routing that validation prefers"),
    (r"what exits save at next to no loss", "what exits save at a loss close to the model's best"),
    (r"what makes a token hard, and which tokens gain", "which tokens are hard, and which gain"),
    (r"what the leak is worth", "in-sample and held-out figures"),
    (r"what every line took", "cost of every line"),
    (r"\bplain's\b", "the standard model's"),
    (r"which asks one head", "which evaluates one head"),
    (r"\bgoing_on\b", "keep"),
)
"""What tables call things -> what the paper calls them."""


def prepare(data: Path, out: Path) -> None:
    """Tables, figures and indexes of all experiments in `data`, which may be missing, into `out`, made anew."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    files = {path.parent.relative_to(data).as_posix(): path for path in data.rglob("test.json")}
    kept = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items()}
    kept = dict(sorted(kept.items(), key=lambda item: (elsewhere(item[1]), item[1]["lab"]["budget"], item[0])))
    for name, told in kept.items():
        (out / name).mkdir(parents=True)
        for table in all_tables(told):
            write(printed(table, told), out / name)
        draw.front(told, out / name / "front")
        timed = data / name / "last-layer.tex"  # not made from test.json
        if timed.exists():
            shutil.copy(timed, out / name)
    whole = {name: told for name, told in kept.items() if not told["original"]}
    apart = {name: told for name, told in kept.items() if told["original"]}  # the parts of ASHEM
    for place, shown in SHOWN.items():
        of = apart if place == "apart" else whole
        index(out / place, [taken(f"{name}/{t}") for name in of for t in shown if (out / name / f"{t}.tex").exists()])
    several = {name: told for name, told in whole.items() if len(told["seeds"]) > 1}
    figures = []
    for name, told in several.items():
        figures += picture(f"{name}/front", marker(told), caption(told, LATER if figures else KEY))
    index(out / "fronts", figures)
    if kept:
        single(setup(list(kept.values())), out)
    if several:
        single(distances(list(several.values())), out)
    for told in list(apart.values())[:1]:
        single(ablation(told), out)
    for place, made in KEPT.items():
        if (data / made[0]).exists():
            single(from_markdown(place, (data / made[0]).read_text(encoding="utf-8"), *made[1:]), out)
    stdlib = {name: told for name, told in whole.items() if not elsewhere(told)}
    fronts = [told for name, told in stdlib.items() if "/" not in name]  # others repeat a scale with more seeds
    if len(fronts) > 1:
        (out / "all").mkdir()
        table = scaling.table(fronts, ())
        write(worded(replace(table, title="Distance from the baseline front as scale grows")), out / "all")
        scaling.picture(fronts, out / "all" / table.name)
        index(out / table.name, [*picture(f"all/{table.name}", table.name, SCALING), taken(f"all/{table.name}")])
    made = cluster.table()
    (out / "cluster.md").write_text(made.markdown(), encoding="utf-8")
    single(worded(made), out)


# ---------------------------------------------------------------------------------------------------------
# Files


def index(stem: Path, lines: Sequence[str]) -> None:
    """What a place in the paper takes in; no file where there is nothing."""
    if lines:
        stem.with_suffix(".tex").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write(table: Table, folder: Path) -> None:
    (folder / f"{table.name}.tex").write_text(signed(table.latex()), encoding="utf-8")


def single(table: Table, out: Path) -> None:
    """A table that is a place of its own; its label has the place's name."""
    text = signed(table.latex()).replace(r"\centering", rf"\label{{tab:{table.name}}}" + "\n" + r"\centering", 1)
    (out / f"{table.name}.tex").write_text(text, encoding="utf-8")


def signed(text: str) -> str:
    """LaTeX with minus signs before numbers, where there were hyphens."""
    return re.sub(r"(?<=[ (])-(?=\d)", "$-$", text)


def taken(name: str) -> str:
    return rf"\input{{build/data/{name}}}"


def picture(name: str, mark: str, text: str) -> list[str]:
    """A figure, its label and what is seen in it."""
    start = [r"\begin{figure}", r"\centering", rf"\includegraphics[width=0.94\linewidth]{{build/data/{name}.pdf}}"]
    return [*start, rf"\caption{{{signed(tex(text))}}}\label{{fig:{mark}}}", r"\end{figure}"]


# ---------------------------------------------------------------------------------------------------------
# Words


def worded(table: Table) -> Table:
    """A table in the paper's words."""
    rows = [[wording(short(cell)) for cell in row] for row in table.rows]
    header, told = [wording(cell) for cell in table.header], [wording(note) for note in table.notes]
    return replace(table, title=wording(table.title), header=header, rows=rows, notes=told)


def wording(text: str) -> str:
    for old, new in WORDS:
        text = re.sub(old, new, text)
    return text


RANGE = r"\(([-+]?[\d.,]+)%? to ([-+]?[\d.,]+)%?\)"
DIFFERENCE = re.compile(rf"([-+][\d.]+)% {RANGE}(, noise)?")


def short(cell: str) -> str:
    """A cell with its interval in brackets; a difference loses its per cent signs, and * says that it is not noise."""
    cell = DIFFERENCE.sub(lambda found: f"{found[1]}{'' if found[4] else '*'} ({found[2]}, {found[3]})", cell)
    return re.sub(RANGE, r"(\1, \2)", cell)


def printed(table: Table, told: dict[str, Any]) -> Table:
    """An experiment's table in the paper's words, without the configuration that the table of experiments lists."""
    title = re.sub(r"^[^:]*: ", "", table.title)
    own = [] if table.name in EXPLAINED else [note for note in table.notes if note not in notes(told)]
    if table.name in COLUMNS:
        left = COLUMNS[table.name]
        rows = [[row[c] for c in left] for row in table.rows]
        table = replace(table, header=[table.header[c] for c in left], rows=rows)
    return worded(replace(table, title=f"{called(told)}: {title}", notes=own))


def elsewhere(told: dict[str, Any]) -> bool:
    """Whether an experiment is on other data than the standard library."""
    return "--data stdlib" not in told["command"]


def called(told: dict[str, Any]) -> str:
    """An experiment's name: its scale, and how many seeds it has."""
    scale, seeds = told["title"].rsplit(" ", 1)[-1], len(told["seeds"])
    return f"{SCALES.get(scale, f'scale {scale}').capitalize().replace('ikitext', 'ikiText')}, {counted(seeds, 'seed')}"


def marker(told: dict[str, Any]) -> str:
    """What an experiment's figure is referred to by: its scale, and how many seeds it has."""
    return f"{told['title'].rsplit(' ', 1)[-1]}-{NUMBERS[len(told['seeds'])]}"


def counted(number: int, what: str) -> str:
    return f"{NUMBERS[number] if number < len(NUMBERS) else number} {what}{'' if number == 1 else 's'}"


def caption(told: dict[str, Any], key: str) -> str:
    """What is seen in an experiment's figure, beside the key to its colours."""
    fronts = Fronts(told)
    best = min(fronts.strategies, key=lambda name: fronts.gap(fronts.best(name), "val").mean)
    gap = (
        marked(fronts.gap(fronts.best(best)))
        .replace("*", "")
        .replace(" (", "% (")
        .replace(",", "% to")
        .replace(")", "%)")
    )
    return (
        f"{called(told)}, {told['lab']['budget']:.0e} training FLOPs for every line: test perplexity against counted "
        f"inference FLOPs (left) and measured time (right). {key} Validation prefers {draw.label(best)}; on test it is "
        f"at {gap} of perplexity against the baseline front, paired by seed."
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
    """What every experiment ran with."""
    rows = []
    for told in kept:
        lab = told["lab"]
        rows.append(
            [
                called(told) + (": ASHEM's components" if told["original"] else ""),
                f"{lab['tokens']['train']:,}",
                f"{lab['vocab_size']:,}",
                str(lab["dim"]),
                ", ".join(str(re.sub(r"\D+", "", name)) for name in told["plain"]),
                f"{lab['budget']:.1e}",
                ", ".join(f"{lr:g}" for lr in lab["lrs"]),
                str(len({entry["line"] for entry in told["entries"]})),
            ]
        )
    header = ["experiment", "training tokens", "vocabulary", "dim", "depths", "FLOPs", "learning rates", "lines"]
    about = (
        "Depths: of the standard models. FLOPs: for training, of every line. Learning rates: each is tried with the "
        "first seed and chosen on validation. Lines: trained with all seeds."
    )
    return Table("setup", "The experiments", header, rows, [about])


def distances(kept: Sequence[dict[str, Any]]) -> Table:
    """Every strategy's distance from the baseline front at every scale, from the experiment with most seeds."""
    scales: dict[str, list[Fronts]] = {}
    for told in sorted(kept, key=lambda told: -len(told["seeds"])):
        scales.setdefault(column(told), []).append(Fronts(told))
    scales = {scale: scales[scale] for scale in dict.fromkeys(map(column, kept))}
    names = {name for all_fronts in scales.values() for fronts in all_fronts for name in fronts.strategies}
    rows = []
    for name in sorted(names, key=draw.order):
        cells = []
        for all_fronts in scales.values():
            fronts = next((fronts for fronts in all_fronts if name in fronts.places), None)
            five = " †" if fronts and len(fronts.data["seeds"]) > LEAST else ""
            cells.append(marked(fronts.gap(fronts.best(name))) + five if fronts else "")
        rows.append([draw.label(name), *cells])
    note = (
        "At the same inference FLOPs and at the routing that validation prefers; negative is better. In brackets: 95% "
        "intervals over three seeds, or over five where † follows, differences paired by seed, not corrected for the "
        "number of rows; * marks those without zero. Empty: not trained there. Classifier exit: its confidence comes "
        "from a linear classifier instead of the head."
    )
    title = "Distance of every strategy from the baseline front, in per cent of test perplexity"
    return Table("distances", title, ["strategy", *scales], rows, [note])


def column(told: dict[str, Any]) -> str:
    """An experiment's scale where there is little room."""
    return re.sub(r",.*|^Scale (?=\w+,)| in byte pairs", "", called(told))


def marked(interval: Interval) -> str:
    """Per cent of perplexity, with its interval and a mark where that does not hold zero."""
    if math.isnan(interval.mean):
        return ""
    mean = f"{percent(interval.mean):+.1f}"
    if interval.low is None or interval.high is None:
        return mean
    star = "" if interval.noise else "*"
    return f"{mean}{star} ({percent(interval.low):+.1f}, {percent(interval.high):+.1f})"


def ablation(told: dict[str, Any]) -> Table:
    """Variants of ASHEM where half of the tokens continue, and at full depth."""
    fronts, original = Fronts(told), told["original"]

    def against(place: Place, name: str) -> str:
        interval = fronts.beside(place, name)
        return "" if interval is None or name == place.line else marked(interval)

    rows = []
    for name in (*told["unfinished"], *told["plain"], *fronts.strategies):
        half = next((place for place in fronts.places[name] if place.candidate.share == COMPARED), None)
        full = fronts.full_depth(name)
        compared = half or full
        versus = [against(compared, other) for other in told["beside"]]
        mean = f"{math.exp(compared.mean('loss')):.3f}"
        rows.append([draw.label(name), mean, *versus, against(full, original) if half else ""])
    about = (
        "Test perplexity and, in per cent, against other lines (* where the interval over three seeds does not hold "
        "zero). Lines with an exit are at the routing where half of the tokens continue past it, the others at their "
        "only depth; the last column compares full depths. Negative is better."
    )
    header = ["line", "PPL", *(f"vs. {draw.label(name)}" for name in told["beside"])]
    header += [f"vs. {original}, full depth"]
    return Table("ablation", f"{called(told)}: ASHEM with one part changed at a time", header, rows, [about])


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
        "seed-recipe.md",
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
        "Greedy, 128 new tokens after 64 of held-out text, one thread. Speed is relative to full-depth decoding with "
        "the same number of rows: median and range of four rounds. Every way gives the tokens of full depth.",
        ("way", "rows", "tokens/s", "speed", "layers per token", "drafts accepted"),
        (0, 1, 2, 3, 5, 6),
        lambda row: "final norm" not in row[0],
    ),
}
"""Place -> file, title, note, header, columns and which rows of the file's first table."""


def from_markdown(
    name: str,
    text: str,
    title: str,
    note: str,
    header: Sequence[str],
    columns: Iterable[int],
    wanted: Callable[[Row], bool],
) -> Table:
    """Columns of the first table of a page."""
    lines = re.search(r"^\|.*?(?=^\s*$|\Z)", text, re.M | re.S)
    assert lines, f"no table for {name}"
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines[0].splitlines()[2:]]
    kept = [[bare(row[c]) if c < len(row) else "" for c in columns] for row in rows if wanted(row)]
    return worded(Table(name, title, header, kept, [note]))


def bare(cell: str) -> str:
    return RUNS.get(cell, cell.replace("**", ""))


if __name__ == "__main__":
    prepare(ROOT / "docs" / "data", ROOT / "paper" / "build" / "data")
