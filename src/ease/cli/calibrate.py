"""`ease calibrate`: choose thresholds for a target."""

from dataclasses import dataclass
from pathlib import Path

from ease.errors import EaseError

USAGE = "RUN --min-agreement 0.99"
HELP = "choose thresholds for a target, a budget or a bound"


def main(args: list[str]) -> None:
    """Calibrate the thresholds of a run and print the outcome."""
    import tyro

    from ease.cli.console import error_console
    from ease.cli.progress import ProgressDisplay
    from ease.evaluation.calibration import GOALS, Target
    from ease.runs import reopen

    @dataclass(frozen=True)
    class Arguments:
        """Choose the thresholds of a run for one target and store them as its policy."""

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

    given = tyro.cli(Arguments, args=args, prog="ease calibrate")
    targets = [Target(kind, value, given.confidence) for kind in GOALS if (value := getattr(given, kind)) is not None]
    if len(targets) != 1:
        options = ", ".join(f"--{kind.replace('_', '-')}" for kind in GOALS)
        raise EaseError(f"give exactly one target: {options}")
    (target,) = targets
    with ProgressDisplay(error_console()) as progress:
        record = reopen.calibrate(given.run, target, progress.line)
    metrics = record["held_out"]
    policy = zip(record["policy"]["exits"], record["policy"]["thresholds"], strict=True)
    print(
        f"Thresholds for {target}: " + ", ".join(f"{t:.4g} at layer {e}" for e, t in policy) + "\n"
        f"On the {metrics['sequences']} test sequences that were not used to choose them: "
        f"{metrics['shallow_ratio']:.1%} of the tokens exit early, {metrics['flops_share']:.1%} of the FLOPs, "
        f"agreement {metrics['agreement']:.2%}, "
        f"perplexity {metrics['ppl']:.2f} ({metrics['ppl_full']:.2f} at full depth).\n"
        f"Policy: {given.run / 'policy.json'}"
    )
