"""`ease run`: train a recipe, compare it with baselines, and write a run folder."""

import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from ease.cli.recipes import load_recipe, recipes, summary_of
from ease.errors import EaseError
from ease.launcher import launched

USAGE = "RECIPE [--data D] [--out DIR] [overrides]"
HELP = "train, compare, score, write a run folder"


def main(args: list[str]) -> None:
    """List the recipes, or execute one with overrides."""
    if not args or args[0] in ("-h", "--help"):
        print(recipe_list())
        return
    import tyro

    from ease.cli.console import error_console, output_console
    from ease.cli.progress import ProgressDisplay
    from ease.report.tables import decoding_sentence, decoding_table, drafts_sentence, text_table
    from ease.report.verdict import verdict
    from ease.runs import runner
    from ease.runs.config import RunConfig
    from ease.runs.log import LOG_EVERY
    from ease.training.execution import Execution

    recipe = load_recipe(args[0]).config()
    if not isinstance(recipe, RunConfig):
        raise EaseError(f"config() of {args[0]} returns {type(recipe).__name__}: return an ease.runs.RunConfig")
    kind: Any = RunConfig[type(recipe.strategy)]  # type: ignore[misc]  # so that options are those of the strategy

    @dataclass(frozen=True)
    class Arguments:
        config: Annotated[kind, tyro.conf.arg(name="")]
        out: Path | None = None
        """The run folder (runs/NAME by default)."""
        overwrite: bool = False
        """Replace the folder if it holds a run or a checkpoint; discard an unfinished run with other options."""
        track: str = ""
        """Trackers that also receive the metrics, separated by commas: tensorboard, wandb, trackio."""
        log_every: int = LOG_EVERY
        """Optimizer steps between two rows of metrics.jsonl."""

    short = {"--data": "--data.source", "--allow-overlap": "--data.allow-overlap"}
    for prefix in ("", "no-"):
        short |= {f"--{prefix}{name}": f"--execution.{prefix}{name}" for name in option_names(Execution)}
    rest = expand_options(args[1:], short)
    given = tyro.cli(Arguments, args=rest, default=Arguments(recipe), prog=f"ease run {args[0]}", description="")
    options = {arg.partition("=")[0].replace("_", "-") for arg in rest}  # also those that repeat the recipe's value
    if given.config.start is not None and any(o.startswith(("--model.", "--data.tokenizer")) for o in options):
        raise EaseError("the model of --start determines shape and tokenizer: leave out --model.* and --data.tokenizer")
    if "--compare-layers" in options and "standard" not in given.config.compare:
        raise EaseError("--compare-layers are the depths of the standard baselines: add standard to --compare")
    out = given.out or Path("runs") / given.config.name
    track = tuple(filter(None, given.track.split(",")))
    written: dict[str, Any] = {"overwrite": given.overwrite, "track": track, "log_every": given.log_every}
    if launched():  # the first process shows what all do
        runner.run(given.config, out, **written)
        return
    console = error_console()
    with ProgressDisplay(console) as progress:
        say = lambda text: console.print(f"ease: {text}", markup=False, soft_wrap=True)  # noqa: E731
        summary = runner.run(given.config, out, **written, progress=progress.line, say=say)
    shown = output_console()
    shown.print(text_table(summary))
    judged = verdict(summary)
    shown.print(f"{judged.headline}\n{judged.detail}", markup=False)
    if speeds := decoding_table(summary):
        shown.print(speeds)
        shown.print(decoding_sentence(summary), markup=False)
    if drafts := drafts_sentence(summary):
        shown.print(drafts, markup=False)
    if summary["note"]:
        shown.print(summary["note"], markup=False)
    shown.print(f"Report: {out / 'report.html'}", markup=False, soft_wrap=True)


def recipe_list() -> str:
    """The text of `ease run`, as wide as the terminal."""
    width = min(100, shutil.get_terminal_size().columns)
    lines = ["usage: ease run RECIPE [--data D] [--out DIR] [--overwrite] [overrides]", "", "recipes:"]
    for name, path in recipes().items():
        lines.append(
            textwrap.fill(
                summary_of(path),
                width,
                initial_indent=f"  {name:18}",
                subsequent_indent=" " * 20,
                break_on_hyphens=False,
            )
        )
    return "\n".join([*lines, "", "`ease run RECIPE --help` shows every option that can be overridden."])


def option_names(config: type[Any]) -> list[str]:
    """The options of a configuration's fields."""
    return [field.name.replace("_", "-") for field in fields(config)]


def expand_options(args: list[str], short: Mapping[str, str]) -> list[str]:
    """Replace short names of options by the full ones, also in --name=value."""
    parts = (arg.partition("=") for arg in args)
    return [short.get(name, name) + equals + value for name, equals, value in parts]
