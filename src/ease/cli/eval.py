"""`ease eval`: score a run's model on its test split."""

from pathlib import Path

from ease.cli.progress import ProgressBars

USAGE = "RUN [--threshold T ...]"
HELP = "score a run's model on its test split, routed at T"


def main(args: list[str]) -> None:
    import tyro
    from rich.console import Console
    from rich.table import Table

    from ease.runs import reopen as finished

    def eval_(run: tyro.conf.Positional[Path], threshold: tuple[float, ...] = ()) -> tuple[Path, tuple[float, ...]]:
        """Score a run's model on its test split; routing really runs.

        Args:
            run: the run's folder.
            threshold: confidences in [0, 1] at which a token leaves, one evaluation each.
        """
        return run, threshold

    folder, thresholds = tyro.cli(eval_, args=args, prog="ease eval")
    with ProgressBars(Console(stderr=True, highlight=False)) as progress:
        rows = finished.evaluate(folder, list(thresholds), progress.line)
    table = Table(title=f"{folder.name}, measured on the {rows[0]['split']}")
    for column in ("threshold", "PPL", "accuracy", "leaving early", "compute", "FLOPs/token", "seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            ", ".join(f"{t:.4g}" for t in row["thresholds"]) or "none",
            f"{row['ppl']:.2f}",
            f"{row['acc']:.2%}",
            f"{row['shallow_ratio']:.1%}",
            f"{row['compute_cost']:.1%}",
            f"{row['flops_per_token']:,.0f}",
            f"{row['seconds']:.2f}",
        )
    Console(highlight=False).print(table)
