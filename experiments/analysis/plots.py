"""Figures of fronts: test perplexity against inference compute, counted and measured, and gaps over scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.analysis import compute
from experiments.analysis.fronts import Fronts, OperatingPoint
from experiments.analysis.looks import coloured, look
from experiments.analysis.statistics import Fit, Interval
from experiments.analysis.table import percent

STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "svg.hashsalt": "ease",  # the same data gives the same file
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}


def front(data: dict[str, Any], stem: Path) -> None:
    """Plot every strategy's front and the standard models, with 95% intervals: the best in colour, the others in grey.

    Args:
        data: the content of a `test.json`.
        stem: the file to write, without suffix.
    """
    fronts = Fronts(data)
    names = sorted(fronts.strategies, key=lambda name: fronts.gap(fronts.best(name), "val").mean)
    bright = coloured(names)
    timed = all("microseconds" in point.by_seed[0] for name in fronts.shown for point in fronts.points[name])
    axes_of: list[tuple[str, Callable[[OperatingPoint], float]]] = [
        ("inference FLOPs per token, in thousands", lambda point: point.mean("flops_per_token") / 1e3)
    ]
    if timed:
        axes_of.append(("microseconds per token", lambda point: point.by_seed[0]["microseconds"]["median"]))

    def picture(pyplot: Any) -> Any:
        figure, axes = pyplot.subplots(1, len(axes_of), figsize=(3.6 * len(axes_of), 2.8), sharey=True, squeeze=False)
        standard = [fronts.full_depth(name) for name in fronts.baselines]
        # The range covers the best point of every strategy; points far above are cut off to keep differences visible.
        shown = [*standard, *map(fronts.best, names)]
        for ax, (text, cost) in zip(axes[0], axes_of, strict=True):
            for name in names:
                if name not in bright:
                    curve(ax, fronts.front(name), cost, color="0.75", marker=".", linewidth=0.8, label="_")
            for name in bright:
                colour, mark = look(name)
                curve(ax, fronts.front(name), cost, color=colour, marker=mark, label=name, bars=True)
            curve(ax, standard, cost, color="black", marker="x", linestyle="none", label="_", bars=True)
            front_label = "standard models: baseline front"
            curve(ax, fronts.baseline_front, cost, color="black", marker="x", label=front_label, linewidth=1.8)
            if fronts.with_memory:
                own = "second front: with a memory"
                curve(ax, fronts.with_memory.baseline_front, cost, color="black", marker="+", linestyle="--", label=own)
            best = fronts.baseline_front[-1]
            level = math.exp(best.mean("loss"))  # the best standard model can always be used
            ax.plot([cost(best), max(map(cost, shown))], [level, level], color="black", linestyle=":", linewidth=1.2)
            ax.set_xlabel(text)
        means = [math.exp(point.mean("loss")) for point in shown]
        margin = 0.1 * (max(means) - min(means)) or 1.0
        axes[0][0].set_ylim(min(means) - margin, max(means) + margin)
        axes[0][0].set_ylabel("test perplexity")
        if marks := compute.ticks(fronts, *axes[0][0].get_ylim()):
            second = axes[0][-1].secondary_yaxis("right")
            second.set_yticks(*zip(*marks))
            second.set_yticks([], minor=True)
            second.set_ylabel("compute multiplier")
        if len(bright) < len(names):
            axes[0][0].plot([], [], color="0.75", marker=".", label="other strategies")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3 if timed else 2)
        return figure

    save(picture, stem)


def curve(
    ax: Any,
    points: Sequence[OperatingPoint],
    cost: Callable[[OperatingPoint], float],
    *,
    bars: bool = False,
    **style: Any,
) -> None:
    """Plot perplexity against cost through points, with 95% intervals if `bars`."""
    points = sorted(points, key=cost)
    x, losses = [cost(point) for point in points], [Interval.of(point.metric("loss")) for point in points]
    y = [math.exp(interval.mean) for interval in losses]
    if bars and losses[0].low is not None:
        low = [a - math.exp(i.low) for a, i in zip(y, losses) if i.low is not None]
        high = [math.exp(i.high) - a for a, i in zip(y, losses) if i.high is not None]
        ax.errorbar(x, y, (low, high), elinewidth=0.7, capsize=1.5, **style)
    else:
        ax.plot(x, y, **style)


def scales(gaps: dict[str, list[tuple[float, Interval]]], fits: dict[str, Fit], stem: Path) -> None:
    """Plot every strategy's distance from the baseline front against training FLOPs, with the fits.

    Args:
        gaps: strategy -> (training FLOPs, loss above the baseline front) at each scale.
        fits: strategy -> fit over the scales.
        stem: the file to write, without suffix.
    """
    names = coloured(list(gaps))

    def picture(pyplot: Any) -> Any:
        figure, ax = pyplot.subplots(figsize=(5, 3.2))
        ax.axhline(0, color="black", linewidth=0.8)
        for number, name in enumerate(names):
            each, (colour, mark) = gaps[name], look(name)
            shift = 1.06 ** (number - (len(names) - 1) / 2)  # so that the bars of a scale do not cover each other
            x, y = [flops for flops, _ in each], [percent(interval.mean) for _, interval in each]
            low = [a - percent(i.low if i.low is not None else i.mean) for a, (_, i) in zip(y, each)]
            high = [percent(i.high if i.high is not None else i.mean) - a for a, (_, i) in zip(y, each)]
            at = [shift * flops for flops in x]
            ax.errorbar(at, y, (low, high), color=colour, marker=mark, linestyle="none", capsize=1.5, label=name)
            if name in fits:
                ax.plot(at, [percent(fits[name].at(math.log10(flops)).mean) for flops in x], color=colour)
        budgets = sorted({flops for each in gaps.values() for flops, _ in each})
        ax.set_xscale("log")
        ax.set_xticks(budgets, [f"{flops:.1e}" for flops in budgets])
        ax.set_xticks([], minor=True)
        ax.set_xlabel("training FLOPs of a line")
        ax.set_ylabel("perplexity against the baseline front, %")
        figure.legend(loc="outside lower center", ncols=3)
        return figure

    save(picture, stem)


def save(picture: Callable[[Any], Any], stem: Path) -> None:
    """Save as SVG and PDF, without a date, so that the same data gives the same files."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure = picture(pyplot)
        figure.set_layout_engine("constrained")
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None})
        pyplot.close(figure)
