"""`ease calibrate`: choose thresholds for a target."""

from dataclasses import dataclass
from pathlib import Path

from ease.cli.progress import ProgressBars
from ease.errors import EaseError

USAGE = "RUN --min-agreement 0.99"
HELP = "choose thresholds for a target, a budget or a bound"


def main(args: list[str]) -> None:
    import tyro
    from rich.console import Console

    from ease.evaluation.calibration import GOALS, Target
    from ease.runs import reopen as finished

    @dataclass(frozen=True)
    class Arguments:
        """Choose the thresholds of a run for one target, and make them its policy (policy.json in its folder)."""

        run: tyro.conf.Positional[Path]
        """The run's folder."""
        min_agreement: float | None = None
        """Share of tokens, at least, that are given the last exit's prediction."""
        max_ppl_increase: float | None = None
        """Share, at most, by which perplexity is above that of full depth."""
        target_ratio: float | None = None
        """Share of tokens, at most, that reach the last exit."""
        compute_budget: float | None = None
        """FLOPs per token at most, heads included, as a share of full depth without exits."""
        confidence: float | None = None
        """Probability with which the target holds, over the draw of the calibration sequences."""

    given = tyro.cli(Arguments, args=args, prog="ease calibrate")
    targets = [Target(kind, value, given.confidence) for kind in GOALS if (value := getattr(given, kind)) is not None]
    if len(targets) != 1:
        options = ", ".join(f"--{kind.replace('_', '-')}" for kind in GOALS)
        raise EaseError(f"give one target, and no more: {options}")
    (target,) = targets
    with ProgressBars(Console(stderr=True, highlight=False)) as progress:
        record = finished.calibrate(given.run, target, progress.line)
    seen = record["held_out"]
    policy = zip(record["policy"]["exits"], record["policy"]["thresholds"], strict=True)
    print(
        f"Thresholds for {target}: " + ", ".join(f"{t:.4g} at layer {e}" for e, t in policy) + "\n"
        f"On the {seen['sequences']} sequences of the test split that chose nothing: "
        f"{seen['shallow_ratio']:.1%} of the tokens leave early, {seen['flops_share']:.1%} of the FLOPs, "
        f"agreement {seen['agreement']:.2%}, perplexity {seen['ppl']:.2f} ({seen['ppl_full']:.2f} at full depth).\n"
        f"The policy: {given.run / 'policy.json'}"
    )
