"""What `ease generate` and `ease serve` share: the mode, sampling defaults, and the line about an answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ease.errors import EaseError

if TYPE_CHECKING:
    from ease.generation.decode import Mode
    from ease.models import StandardTransformer


def check_threshold(mode: str | None, threshold: float | None) -> None:
    """Raises EaseError for a threshold in a mode that does not route."""
    if threshold is not None and mode in ("full", "exact"):
        raise EaseError(f"--threshold applies to mode routed, not {mode}: leave it out")


def choose_mode(name: str, model: StandardTransformer, mode: Mode | None, threshold: float | None) -> Mode:
    """The mode to decode in; sets the threshold, if there is one, at all exits of the model's policy.

    Args:
        name: what the user calls the model.
        model: the model.
        mode: the mode that was asked for (by default routed if the model has a policy, else full).
        threshold: the threshold that was asked for.

    Raises:
        EaseError: the model has no exits, or no policy to route with.
    """
    from ease.policy import Policy

    if threshold is not None:
        exits = model.policy.exits or model.early_exits
        if not exits:
            raise EaseError(f"{name} has no exits to route at: leave out --threshold, or tune it first")
        model.policy = Policy.of(exits, (threshold,) * len(exits), **model.policy.options)
    routes = bool(model.policy.exits)
    if mode == "routed" and not routes:
        raise EaseError(f"{name} has no policy to route with: add --threshold, or use --mode full")
    return mode or ("routed" if routes else "full")


def default_sampling(checkpoint: Path | None) -> dict[str, Any]:
    """The sampling settings of a checkpoint, None for a run without one, as keyword arguments of `ease.generate`.

    Settings that `ease.generate` does not have are named on stderr.
    """
    from ease.cli.console import error_console
    from ease.hf.prompting import sampling_defaults

    defaults, others = ({}, []) if checkpoint is None else sampling_defaults(checkpoint)
    if others:
        error_console().print(
            f"ease: generation_config.json sets {', '.join(others)}, which ease does not apply", soft_wrap=True
        )
    return defaults


def statistics(
    stats: Mapping[str, Any], exits: Sequence[int], num_layers: int, colors: Mapping[int, str] | None = None
) -> str:
    """A line about one row that `ease.generate` decoded, in the markup of rich.

    Args:
        stats: statistics of the call; those that are missing are left out of the line.
        exits: (N,) the exit of each token.
        num_layers: the depth of the model.
        colors: the color of each exit's tokens.
    """
    parts = [
        f"{stats['tokens']} token{'' if stats['tokens'] == 1 else 's'}, {stats['tokens_per_second']:.1f} per second"
    ]
    if exits:
        shares = {exit: f"layer {exit}: {count / len(exits):.0%}" for exit, count in sorted(Counter(exits).items())}
        marked = [f"[{colors[exit]}]{share}[/]" if colors else share for exit, share in shares.items()]
        parts.append("predicted at " + ", ".join(marked))
    if "layers_per_token" in stats:
        parts.append(f"{stats['layers_per_token']:.1f} of {num_layers} layers run per token")
    if stats.get("acceptance") is not None:
        parts.append(f"{stats['acceptance']:.0%} of the drafts accepted")
    return "; ".join(parts)
