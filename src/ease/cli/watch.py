"""`ease watch`: show a run in the terminal while it trains."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from ease.runs.live import LiveRun

USAGE = "RUN [--once]"
HELP = "show a run in the terminal while it trains"

SECONDS = 1.0  # between two looks at the files

BARS, PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.:-=+*#"  # from small to large; the second for terminals without Unicode

WIDTH = 50  # columns of the loss

SAYS = {
    "not started": "not started",
    "running": "running",
    "stopped": "stopped before its end; the command that started it resumes it",
    "finished": "finished",
}


def main(args: list[str]) -> None:
    """Show a run until it is finished, or once."""
    import tyro

    from ease.cli.console import output_console
    from ease.runs.live import LiveRun

    def watch(run: tyro.conf.Positional[Path], once: bool = False) -> tuple[Path, bool]:
        """Show a run in the terminal while it trains, from its files.

        Args:
            run: the run folder (the --out of `ease run`), which need not exist yet.
            once: print the state once and end; what is not a terminal is always written to once.
        """
        return run, once

    folder, once = tyro.cli(watch, args=args, prog="ease watch", config=(tyro.conf.FlagCreatePairsOff,))
    live, console = LiveRun(folder), output_console()
    live.refresh()
    if once or not console.is_terminal:
        console.print(view(live, console))
        return
    with suppress(KeyboardInterrupt):
        follow(live, console)


def follow(live: "LiveRun", console: "Console") -> None:
    """Shows a run until it is finished."""
    from rich.live import Live

    with Live(view(live, console), console=console, auto_refresh=False) as shown:
        while live.state != "finished":
            time.sleep(SECONDS)
            live.refresh()
            shown.update(view(live, console), refresh=True)


def view(live: "LiveRun", console: "Console") -> "RenderableType":
    """What is shown of a run, in at most 80 columns."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    age = f"; last row {_duration(live.age)} ago" if live.state == "running" and live.age is not None else ""
    parts: list[RenderableType] = [Text(f"{live.run.name}: {SAYS[live.state]}{age}", style="bold")]
    if live.rows and live.state != "finished":
        line = live.rows[-1]["line"]
        step, epoch = _last(live.rows, line, "step"), _last(live.rows, line, "epoch")
        now = live.rows[-1]
        bar = Table.grid(padding=(0, 2))
        left = step.get("seconds_left")
        remaining = f"{_duration(left)} left" if left is not None and live.state == "running" else ""
        fraction = step.get("fraction") or 0.0
        place = f"{line}, epoch {now['epoch']:.0f}, step {now['step']:.0f}"
        bar.add_row(place, ProgressBar(1.0, fraction, width=20), f"{fraction:4.0%}", remaining)
        details = Table.grid(padding=(0, 2))
        for name, text in _details(live.rows, step, epoch, _can_show(console, BARS)):
            details.add_row(name, text)
        parts += [bar, details]
    if live.rows:
        parts.append(_lines(live.rows))
    return Group(*parts)


def sparkline(values: Sequence[float], width: int, bars: str = BARS) -> str:
    """Values as characters of different height, from the smallest to the largest; means where there are too many."""
    count = min(width, len(values))
    cuts = [round(i * len(values) / count) for i in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in zip(cuts, cuts[1:])]
    low, high = min(means, default=0.0), max(means, default=0.0)
    top = len(bars) - 1
    return "".join(bars[round((mean - low) / (high - low) * top) if high > low else 0] for mean in means)


def _details(
    rows: Sequence[Mapping[str, Any]], step: Mapping[str, Any], epoch: Mapping[str, Any], unicode: bool
) -> list[tuple[str, str]]:
    from ease.report.formats import format_flops

    found: list[tuple[str, str]] = []
    if step:
        losses = [row["loss"] for row in _segment(rows, step["line"]) if row.get("loss") is not None]
        found.append(("loss", f"{_number(step['loss'])}  {sparkline(losses, WIDTH, BARS if unicode else PLAIN_BARS)}"))
        parts = step.get("exit_losses") or {}
        if len(parts) > 1:
            found.append(("loss per exit", "  ".join(f"{exit}: {_number(loss)}" for exit, loss in parts.items())))
    if epoch:
        accuracy = f", accuracy {epoch['val_acc']:.1%}" if epoch.get("val_acc") is not None else ""
        found.append(("validation", f"PPL {_number(epoch.get('val_ppl'))}{accuracy} (epoch {epoch['epoch']:.0f})"))
        if shares := epoch.get("exit_shares"):
            found.append(("exits", "  ".join(f"{exit}: {share:.1%}" for exit, share in shares.items())))
    if step.get("tokens_per_second") is not None:
        share = step.get("flops_utilization")
        peak = f" ({share:.0%} of the peak)" if share is not None else ""
        speeds = format_flops(step["tokens_per_second"]), format_flops(step["flops_per_second"])
        found.append(("speed", f"{speeds[0]} tokens/s, {speeds[1]} FLOP/s{peak}"))
    if step:
        memory = f"{step['memory_bytes'] / 2**20:.0f} MiB, " if step.get("memory_bytes") is not None else ""
        found.append(("memory", f"{memory}learning rate {step['lr']:.2g}, gradient norm {_number(step['grad_norm'])}"))
    return found


def _lines(rows: Sequence[Mapping[str, Any]]) -> "RenderableType":
    """A table of the lines, as of their last epochs."""
    from rich.table import Table

    from ease.report.formats import format_flops

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("line", max_width=32, no_wrap=True, overflow="ellipsis")
    for name in ("epochs", "steps", "FLOPs", "val PPL", "accuracy"):
        table.add_column(name, justify="right")
    for line in dict.fromkeys(row["line"] for row in rows):
        if epoch := _last(rows, line, "epoch"):
            flops, accuracy = format_flops(epoch["flops"]), epoch.get("val_acc")
            shown = "" if accuracy is None else f"{accuracy:.1%}"
            table.add_row(
                line, f"{epoch['epoch']:.0f}", f"{epoch['step']:.0f}", flops, _number(epoch["val_ppl"]), shown
            )
    return table


def _last(rows: Sequence[Mapping[str, Any]], line: str, event: str) -> Mapping[str, Any]:
    """The last row of a line of that event; empty if there is none. Rows of older versions are epochs."""
    return next((row for row in reversed(rows) if row["line"] == line and row.get("event", "epoch") == event), {})


def _segment(rows: Sequence[Mapping[str, Any]], line: str) -> list[Mapping[str, Any]]:
    """The rows of the steps of the line's phase in progress."""
    steps = [row for row in rows if row["line"] == line and row.get("event") == "step"]
    begin = max((at for at, row in enumerate(steps) if row["step"] == 1), default=0)
    return steps[begin:]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _can_show(console: "Console", text: str) -> bool:
    try:
        text.encode(console.encoding)
    except (UnicodeError, LookupError):
        return False
    return True
