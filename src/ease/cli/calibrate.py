"""`ease calibrate`: choose a policy for a target, if one saves anything."""

from dataclasses import dataclass
from pathlib import Path

from ease.errors import EaseError

USAGE = "RUN --min-agreement 0.99"
HELP = "choose exits and thresholds for a target, if they save anything"


def main(args: list[str]) -> None:
    """Calibrate a run and print the candidates and the outcome."""
    import tyro

    from ease.cli.console import error_console, output_console
    from ease.cli.progress import ProgressDisplay
    from ease.evaluation.calibration import GOALS, Target
    from ease.report.tables import calibration_sentence, calibration_table
    from ease.runs import reopen

    @dataclass(frozen=True)
    class Arguments:
        """Choose exits, a measure and thresholds for a target as a run's policy.

        A policy that saves no FLOPs or no time is not stored: full depth stays.
        """

        run: tyro.conf.Positional[Path]
        """The run folder."""
        min_agreement: float | None = None
        """Smallest share of tokens that get the last exit's prediction."""
        max_ppl_increase: float | None = None
        """Largest relative increase of perplexity over full depth."""
        target_ratio: float | None = None
        """Largest share of tokens that reach the last exit."""
        compute_budget: float | None = None
        """Largest number of FLOPs per token, heads included, as a share of full depth without exits."""
        confidence: float | None = None
        """Probability that the target holds, over the draw of the calibration sequences."""
        exits: str | None = None
        """Exits to search, such as 4,8 (by default all that are trained)."""
        measure: str | None = None
        """The one confidence measure to search: max-probability, margin, entropy, steadiness, or classifier (that of
        the model); or agreement or gain, a classifier that is trained here (by default the run's own,
        max-probability, margin, agreement and gain)."""

    given = tyro.cli(Arguments, args=args, prog="ease calibrate")
    targets = [Target(kind, value, given.confidence) for kind in GOALS if (value := getattr(given, kind)) is not None]
    if len(targets) != 1:
        options = ", ".join(f"--{kind.replace('_', '-')}" for kind in GOALS)
        raise EaseError(f"give exactly one target: {options}")
    (target,) = targets
    try:
        exits = [int(part) for part in (given.exits or "").split(",") if part]
    except ValueError as error:
        raise EaseError(f"--exits must name layers, such as 4,8, got {given.exits}") from error
    with ProgressDisplay(error_console()) as progress:
        record = reopen.calibrate(given.run, target, progress.line, exits=exits, measure=given.measure)
    output_console().print(calibration_table(given.run.name, str(target), record))
    print(calibration_sentence(str(target), record), f"Policy: {given.run / 'policy.json'}", sep="\n")
