"""The front as a picture: test perplexity against inference compute, counted and by the clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.analysis import Fronts, Place
from experiments.statistics import Fit, Interval
from experiments.tables import percent

# Okabe and Ito's colours, told apart by most eyes and, with the marks, in print without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKS = ("o", "s", "^", "D", "v", "P")
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


def front(data: dict[str, Any], stem: Path) -> None:
    """Every strategy's front and the plain models, with 95% intervals: the best few in colour, the others in grey."""
    fronts = Fronts(data)
    order = sorted(fronts.strategies, key=lambda name: fronts.gap(fronts.best(name), "val").mean)
    timed = all("microseconds" in place.points[0] for places in fronts.places.values() for place in places)
    axes_of: list[tuple[str, Callable[[Place], float]]] = [
        ("inference FLOPs per token, in thousands", lambda place: place.mean("flops_per_token") / 1e3)
    ]
    if timed:
        axes_of.append(("microseconds per token", lambda place: place.points[0]["microseconds"]["median"]))

    def picture(pyplot: Any) -> Any:
        figure, axes = pyplot.subplots(1, len(axes_of), figsize=(3.6 * len(axes_of), 3.2), sharey=True, squeeze=False)
        plain = [fronts.full_depth(name) for name in fronts.data["plain"]]
        # Every strategy's best is in the picture; what lies far above may leave it, so that it hides no difference.
        shown = [*plain, *map(fronts.best, order)]
        for ax, (label, cost) in zip(axes[0], axes_of, strict=True):
            for name in order[len(COLOURS) :]:
                curve(ax, fronts.front(name), cost, color="0.75", marker=".", linewidth=0.8, label="_")
            for name, colour, mark in zip(order, COLOURS, MARKS):
                curve(ax, fronts.front(name), cost, color=colour, marker=mark, label=name, bars=True)
            curve(ax, plain, cost, color="black", marker="x", linestyle="none", label="_", bars=True)
            curve(ax, fronts.corners, cost, color="black", marker="x", label="plain models", linewidth=1.8)
            best = fronts.corners[-1]
            level = math.exp(best.mean("loss"))  # the best plain model can always be used
            ax.plot([cost(best), max(map(cost, shown))], [level, level], color="black", linestyle=":", linewidth=1.2)
            ax.set_xlabel(label)
        means = [math.exp(place.mean("loss")) for place in shown]
        margin = 0.1 * (max(means) - min(means)) or 1.0
        axes[0][0].set_ylim(min(means) - margin, max(means) + margin)
        axes[0][0].set_ylabel("test perplexity")
        if order[len(COLOURS) :]:
            axes[0][0].plot([], [], color="0.75", marker=".", label="other strategies")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
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
    """How far each strategy lies from the plain models, against training FLOPs, with the fits."""

    def picture(pyplot: Any) -> Any:
        figure, ax = pyplot.subplots(figsize=(5, 3.2))
        ax.axhline(0, color="black", linewidth=0.8)
        for (name, seen), colour, mark in zip(gaps.items(), COLOURS, MARKS):
            x, y = [flops for flops, _ in seen], [percent(interval.mean) for _, interval in seen]
            low = [a - percent(i.low if i.low is not None else i.mean) for a, (_, i) in zip(y, seen)]
            high = [percent(i.high if i.high is not None else i.mean) - a for a, (_, i) in zip(y, seen)]
            ax.errorbar(x, y, (low, high), color=colour, marker=mark, linestyle="none", capsize=1.5, label=name)
            if name in fits:
                ax.plot(x, [percent(fits[name].at(math.log10(flops)).mean) for flops in x], color=colour)
        budgets = sorted({flops for seen in gaps.values() for flops, _ in seen})
        ax.set_xscale("log")
        ax.set_xticks(budgets, [f"{flops:.1e}" for flops in budgets])
        ax.set_xticks([], minor=True)
        ax.set_xlabel("training FLOPs of a line")
        ax.set_ylabel("perplexity against plain models, %")
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
