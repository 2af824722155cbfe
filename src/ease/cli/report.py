"""`ease report`: write the report of one run or of several."""

from pathlib import Path

from ease.errors import EaseError

USAGE = "RUN [RUN ...] [--out FILE]"
HELP = "write the report of one run, or of several side by side"


def main(args: list[str]) -> None:
    """Write the report of the given runs."""
    import tyro

    from ease.report import write_report

    def report_(run: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> tuple[list[Path], Path | None]:
        """Write the report of one run or of several side by side.

        Args:
            run: run folders.
            out: the HTML file (report.html in the run's folder, or in the current one for several runs).
        """
        return list(run), out

    folders, out = tyro.cli(report_, args=args, prog="ease report")
    if not folders:
        raise EaseError("no run given: ease report RUN [RUN ...]")
    default = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    print(f"Report: {write_report(folders, out or default)}")
