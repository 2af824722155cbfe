"""`ease run`: train a recipe, compare it with baselines, and write a run folder."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ease.cli.progress import ProgressBars
from ease.cli.recipes import load_recipe, recipes
from ease.errors import EaseError

USAGE = "RECIPE [--data D] [--out DIR] [overrides]"
HELP = "train, compare, score, write a run folder"


def main(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print("usage: ease run RECIPE [--data D] [--out DIR] [--overwrite] [overrides]\n\nrecipes:")
        for name in recipes():
            print(f"  {name:18}{(load_recipe(name).__doc__ or '').strip().splitlines()[0]}")
        print("\n`ease run RECIPE --help` shows everything that can be overridden.")
        return
    import tyro
    from rich.console import Console

    from ease import runs
    from ease.report.tables import decoding, decoding_table, text_table
    from ease.report.verdict import verdict

    recipe = load_recipe(args[0]).config()
    if not isinstance(recipe, runs.RunConfig):
        raise EaseError(f"config() of {args[0]} returns {type(recipe).__name__}: return an ease.runs.RunConfig")
    kind: Any = runs.RunConfig[type(recipe.strategy)]  # type: ignore[misc]  # options are those of its strategy

    @dataclass(frozen=True)
    class Arguments:
        config: Annotated[kind, tyro.conf.arg(name="")]
        out: Path | None = None
        """Folder of the run (runs/NAME by default)."""
        overwrite: bool = False
        """Replace the folder if it holds a run or a checkpoint already; discard an unfinished run of other options."""

    # `--data D` is short for the option that is wanted most.
    rest = spell_out(args[1:], {"--data": "--data.source"})
    default = Arguments(recipe)
    given = tyro.cli(Arguments, args=rest, default=default, prog=f"ease run {args[0]}")
    own = (given.config.model, given.config.data.tokenizer) != (recipe.model, recipe.data.tokenizer)
    if own and given.config.start is not None:
        raise EaseError("what --start names brings its shape and tokenizer: leave out --model.* and --data.tokenizer")
    out = given.out or Path("runs") / given.config.name
    console = Console(stderr=True, highlight=False)
    with ProgressBars(console) as progress:
        say = lambda text: console.print(f"ease: {text}", markup=False, soft_wrap=True)  # noqa: E731
        summary = runs.run(given.config, out, overwrite=given.overwrite, progress=progress.line, say=say)
    # A file or a pipe has no width of its own, and the table should not be squeezed into a guess.
    shown = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120)
    shown.print(text_table(summary))
    judged = verdict(summary)
    shown.print(f"{judged.headline}\n{judged.detail}", markup=False)
    if ways := decoding_table(summary):
        shown.print(ways)
        shown.print(decoding(summary), markup=False)
    if summary["note"]:
        shown.print(summary["note"], markup=False)
    shown.print(f"The report: {out / 'report.html'}", markup=False, soft_wrap=True)


def spell_out(args: list[str], short: Mapping[str, str]) -> list[str]:
    """The arguments with short names of options replaced, also where `=` follows."""
    parts = (arg.partition("=") for arg in args)
    return [short.get(name, name) + equals + value for name, equals, value in parts]
