"""The front as a picture: test perplexity against inference compute, counted and by the clock."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.analysis.fronts import Fronts, Place
from experiments.analysis.statistics import Fit, Interval
from experiments.analysis.tables import percent


class Look(NamedTuple):
    """Colour and mark of a line, the same in every figure."""

    colour: str
    mark: str


# Okabe and Ito's colours where strategies meet most, told apart by most eyes; variants of a strategy are shades of its
# colour, and marks tell lines apart in print without colour.
LOOKS = {
    "continued": Look("#666666", "d"),
    "ASHEM": Look("#D55E00", "*"),
    "N-stage": Look("#8C3B00", "h"),
    "open growth": Look("#E69F00", "v"),
    "open growth from the start": Look("#A87400", "v"),
    "progressive growth, 2 depths": Look("#0072B2", "o"),
    "progressive growth, 3 depths": Look("#56B4E9", "s"),
    "progressive growth, 4 depths": Look("#003F66", "8"),
    "stacking": Look("#009E73", "^"),
    "stacking, with exit": Look("#7CCBB5", "^"),
    "gated": Look("#CC79A7", "D"),
    "gated, grown": Look("#7A2E5D", "P"),
    "gated from the start": Look("#E3B5D0", "D"),
    "gated, an exit per layer": Look("#A3487C", "X"),
    "early exit": Look("#8A8A00", "<"),
    "early exit, distilled": Look("#BDBD52", "<"),
    "tuned exit": Look("#6A51A3", ">"),
    "tuned exit, distilled": Look("#B3A2D6", ">"),
    "LayerSkip": Look("#A6761D", "p"),
    "deep supervision": Look("#B2182B", "H"),
    "deep supervision, by depth": Look("#E58A8A", "H"),
    "discriminative": Look("#1B5E20", "X"),
    # Variants of ASHEM, which share no figure with other strategies.
    "mined from one epoch": Look("#0072B2", "o"),
    "chosen by loss": Look("#009E73", "s"),
    "chosen by gain from depth, one epoch": Look("#7CCBB5", "s"),
    "chosen by chance": Look("#1B5E20", "s"),
    "hard ratio 0.1": Look("#E3B5D0", "D"),
    "hard ratio 0.3": Look("#CC79A7", "D"),
    "hard ratio 0.7": Look("#A3487C", "D"),
    "hard ratio 1": Look("#7A2E5D", "D"),
    "copied start": Look("#56B4E9", "^"),
    "random start": Look("#003F66", "v"),
    "tokens without context": Look("#B2182B", "X"),
    "nothing frozen": Look("#8A8A00", "<"),
    "nothing frozen, brick keeps its loss": Look("#A87400", "v"),
    "ASHEM, own head": Look("#F0A070", "*"),
    "ASHEM, own head learns": Look("#8C3B00", "P"),
}
"""Line -> its look. Tables of the paper list lines in this order."""
UNLISTED = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
ALWAYS = ("ASHEM", "continued")
"""Lines in colour wherever they stand."""
BEST = 6
"""Of the other lines, those in colour."""
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "svg.hashsalt": "ease",  # the same figures make the same file
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}


def strategy(line: str) -> str:
    """The entry of `LOOKS` that a line belongs to, whatever its depths are and what its exits evaluate."""
    name = line.removesuffix(", no head asked")
    return f"progressive growth, {name.count('-') + 1} depths" if name.startswith("progressive growth") else name


def look(line: str) -> Look:
    """A line's look; one that is not listed gets a colour by its name, so that it too keeps it in every figure."""
    name = strategy(line)
    return LOOKS.get(name) or Look(UNLISTED[zlib.crc32(name.encode()) % len(UNLISTED)], "o")


def order(line: str) -> tuple[int, str]:
    """The key by which tables list lines: as `LOOKS` does, then by name."""
    names = list(LOOKS)
    name = strategy(line)
    return (names.index(name) if name in names else len(names), line)


def label(line: str) -> str:
    """A line's name as figures and the paper print it."""
    if match := re.fullmatch(r"plain, layers: (\d+)", line):
        return f"standard, {match[1]} layer{'' if match[1] == '1' else 's'}"
    name = "phase 1 continued" if line == "continued" else line
    return name.replace(", no head asked", ", classifier exit")


def coloured(names: Sequence[str]) -> list[str]:
    """Of lines from best to worst, those in colour: the best few, and those that always are."""
    best = [name for name in names if name not in ALWAYS][:BEST]
    return [name for name in names if name in best or name in ALWAYS]


def front(data: dict[str, Any], stem: Path) -> None:
    """Every strategy's front and the standard models, with 95% intervals: the best in colour, the others in grey."""
    fronts = Fronts(data)
    names = sorted(fronts.strategies, key=lambda name: fronts.gap(fronts.best(name), "val").mean)
    bright = coloured(names)
    timed = all("microseconds" in place.points[0] for places in fronts.places.values() for place in places)
    axes_of: list[tuple[str, Callable[[Place], float]]] = [
        ("inference FLOPs per token, in thousands", lambda place: place.mean("flops_per_token") / 1e3)
    ]
    if timed:
        axes_of.append(("microseconds per token", lambda place: place.points[0]["microseconds"]["median"]))

    def picture(pyplot: Any) -> Any:
        figure, axes = pyplot.subplots(1, len(axes_of), figsize=(3.6 * len(axes_of), 2.8), sharey=True, squeeze=False)
        standard = [fronts.full_depth(name) for name in fronts.data["plain"]]
        # Every strategy's best is in the picture; what lies far above may leave it, so that it hides no difference.
        shown = [*standard, *map(fronts.best, names)]
        for ax, (text, cost) in zip(axes[0], axes_of, strict=True):
            for name in names:
                if name not in bright:
                    curve(ax, fronts.front(name), cost, color="0.75", marker=".", linewidth=0.8, label="_")
            for name in bright:
                colour, mark = look(name)
                curve(ax, fronts.front(name), cost, color=colour, marker=mark, label=label(name), bars=True)
            curve(ax, standard, cost, color="black", marker="x", linestyle="none", label="_", bars=True)
            front_label = "standard models: baseline front"
            curve(ax, fronts.corners, cost, color="black", marker="x", label=front_label, linewidth=1.8)
            best = fronts.corners[-1]
            level = math.exp(best.mean("loss"))  # the best standard model can always be used
            ax.plot([cost(best), max(map(cost, shown))], [level, level], color="black", linestyle=":", linewidth=1.2)
            ax.set_xlabel(text)
        means = [math.exp(place.mean("loss")) for place in shown]
        margin = 0.1 * (max(means) - min(means)) or 1.0
        axes[0][0].set_ylim(min(means) - margin, max(means) + margin)
        axes[0][0].set_ylabel("test perplexity")
        if len(bright) < len(names):
            axes[0][0].plot([], [], color="0.75", marker=".", label="other strategies")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4 if timed else 2)
        return figure

    save(picture, stem)


def curve(
    ax: Any, places: Sequence[Place], cost: Callable[[Place], float], *, bars: bool = False, **style: Any
) -> None:
    places = sorted(places, key=cost)
    x, seen = [cost(place) for place in places], [Interval.of(place.figure("loss")) for place in places]
    y = [math.exp(interval.mean) for interval in seen]
    if bars and seen[0].low is not None:
        low = [a - math.exp(i.low) for a, i in zip(y, seen) if i.low is not None]
        high = [math.exp(i.high) - a for a, i in zip(y, seen) if i.high is not None]
        ax.errorbar(x, y, (low, high), elinewidth=0.7, capsize=1.5, **style)
    else:
        ax.plot(x, y, **style)


def scales(gaps: dict[str, list[tuple[float, Interval]]], fits: dict[str, Fit], stem: Path) -> None:
    """How far each strategy lies from the baseline front, against training FLOPs, with the fits."""
    names = coloured(list(gaps))

    def picture(pyplot: Any) -> Any:
        figure, ax = pyplot.subplots(figsize=(5, 3.2))
        ax.axhline(0, color="black", linewidth=0.8)
        for number, name in enumerate(names):
            seen, (colour, mark) = gaps[name], look(name)
            aside = 1.06 ** (number - (len(names) - 1) / 2)  # so that the bars of a scale do not hide each other
            x, y = [flops for flops, _ in seen], [percent(interval.mean) for _, interval in seen]
            low = [a - percent(i.low if i.low is not None else i.mean) for a, (_, i) in zip(y, seen)]
            high = [percent(i.high if i.high is not None else i.mean) - a for a, (_, i) in zip(y, seen)]
            at = [aside * flops for flops in x]
            ax.errorbar(at, y, (low, high), color=colour, marker=mark, linestyle="none", capsize=1.5, label=label(name))
            if name in fits:
                ax.plot(at, [percent(fits[name].at(math.log10(flops)).mean) for flops in x], color=colour)
        budgets = sorted({flops for seen in gaps.values() for flops, _ in seen})
        ax.set_xscale("log")
        ax.set_xticks(budgets, [f"{flops:.1e}" for flops in budgets])
        ax.set_xticks([], minor=True)
        ax.set_xlabel("training FLOPs of a line")
        ax.set_ylabel("perplexity against the baseline front, %")
        figure.legend(loc="outside lower center", ncols=3)
        return figure

    save(picture, stem)


def save(picture: Callable[[Any], Any], stem: Path) -> None:
    """As SVG and PDF, without a date, so that the same figures make the same files."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure = picture(pyplot)
        figure.set_layout_engine("constrained")
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None})
        pyplot.close(figure)
