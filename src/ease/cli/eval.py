"""`ease eval`: score a run's model on its test split."""

from pathlib import Path

USAGE = "RUN [--threshold T ...]"
HELP = "score a run's model on its test split, routed at T"


def main(args: list[str]) -> None:
    """Evaluate a run at its own thresholds or at given ones, and print a table."""
    import tyro

    from ease.cli.console import error_console, output_console
    from ease.cli.progress import ProgressDisplay
    from ease.report.tables import evaluation_table
    from ease.runs import reopen

    def eval_(run: tyro.conf.Positional[Path], threshold: tuple[float, ...] = ()) -> tuple[Path, tuple[float, ...]]:
        """Score a run's model on its test split with real routing.

        Args:
            run: the run folder.
            threshold: confidences in [0, 1] from which on a token exits; one evaluation per threshold.
        """
        return run, threshold

    folder, thresholds = tyro.cli(eval_, args=args, prog="ease eval")
    with ProgressDisplay(error_console()) as progress:
        rows = reopen.evaluate(folder, list(thresholds), progress.line)
    output_console().print(evaluation_table(folder.name, rows))
