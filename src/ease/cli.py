"""`ease`: run a recipe, evaluate a run, write a report, hand a model over to transformers."""

import importlib
import importlib.util
import math
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

from ease.errors import EaseError, check_text

USAGE = """\
usage: ease COMMAND ...

  ease run RECIPE [--data D] [--out DIR] [overrides]   train, compare, score, write a run folder
  ease tune CHECKPOINT --exits 8,16 [--data D] [--out DIR]   give exits to a finished model, whose backbone stays
  ease generate MODEL --prompt TEXT [--mode M]         continue a text, its tokens coloured by exit
  ease eval RUN [--threshold T ...]                    score a run's model on its test split, routed at T
  ease calibrate RUN --min-agreement 0.99              choose thresholds for a target, a budget or a bound
  ease report RUN [RUN ...] [--out FILE]               write the report of one run, or of several side by side
  ease export RUN DIR [--tokenizer C] [--overwrite]    write a run's model as stock transformers loads it
  ease reproduce TIER [--data D] [--model CHECKPOINT]  the paper's tables and figures, from a checkout of ease

`ease run` alone lists the recipes; `ease run RECIPE --help` shows everything that can be overridden.
A run that was killed or interrupted goes on with the same command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Bad input is one sentence on stderr and exit code 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], None]] = {
        "run": run,
        "tune": tune,
        "generate": generate,
        "eval": evaluate,
        "calibrate": calibrate,
        "report": report,
        "export": export,
        "reproduce": reproduce,
    }
    if threading.current_thread() is threading.main_thread():  # a kill is told what was kept, too
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if not args or args[0] in ("-h", "--help", "help"):
            print(USAGE, end="")
        elif args[0] == "--version":
            import ease

            print(f"ease {ease.__version__}")
        elif args[0] in commands:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: print(f"ease: note: {message}", file=sys.stderr)
                commands[args[0]](args[1:])
        else:
            raise EaseError(f"unknown command {args[0]!r}: use {', '.join(commands)} (ease --help)")
    except EaseError as error:
        print(f"ease: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"ease: cannot use {error.filename} ({error.strerror}): check the path and the disk", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:  # it says what was kept
        print(f"ease: interrupted; {stop if stop.args else 'nothing was written'}", file=sys.stderr)
        return 130
    return 0


# ---------------------------------------------------------------------------------------------------------
# ease run


def recipes() -> dict[str, Path]:
    """The recipes that come with ease: beside the package once installed, at the root of a checkout."""
    here = Path(__file__).resolve().parent
    folder = next((f for f in (here / "recipes", here.parents[1] / "recipes") if f.is_dir()), None)
    paths = sorted(folder.glob("*.py")) if folder else []
    return {path.stem.replace("_", "-"): path for path in paths if not path.stem.startswith("_")}


def load_recipe(name: str) -> Any:
    """The module of a recipe, by its name or its path: it has a docstring and a function `config()`."""
    path = recipes().get(name, Path(name))
    if path.suffix != ".py" or not path.is_file():
        raise EaseError(f"no recipe {name!r}: use {', '.join(recipes())}, or the path of a recipe file")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "config", None)):
        raise EaseError(f"{path} is no recipe: it needs a function config() that returns an ease.runs.RunConfig")
    return module


def run(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print("usage: ease run RECIPE [--data D] [--out DIR] [--overwrite] [overrides]\n\nrecipes:")
        for name in recipes():
            print(f"  {name:18}{(load_recipe(name).__doc__ or '').strip().splitlines()[0]}")
        print("\n`ease run RECIPE --help` shows everything that can be overridden.")
        return
    import tyro
    from rich.console import Console

    from ease import runs
    from ease.report import decoding, decoding_table, text_table, verdict

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
    with Progress(console) as progress:
        say = lambda text: console.print(f"ease: {text}", markup=False, soft_wrap=True)  # noqa: E731
        summary = runs.run(given.config, out, overwrite=given.overwrite, watch=progress.line, say=say)
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


def tune(args: list[str]) -> None:
    """`ease run tune` with a checkpoint to start from and the strategy's options under short names."""
    from dataclasses import fields

    from ease.tune import TuneConfig

    if args[:1] in ([], ["-h"], ["--help"]):
        print(TUNE_USAGE, end="")
        return
    if args[0].startswith("-"):
        raise EaseError("name the checkpoint first: ease tune CHECKPOINT --exits 8,16")
    rest = [part for arg in args[1:] for part in (arg.split("=", 1) if arg.startswith("--exits=") else [arg])]
    rest = spell_out(rest, {f"--{f.name.replace('_', '-')}": f"--strategy.{f.name}" for f in fields(TuneConfig)})
    if "--strategy.exits" in rest:
        at = rest.index("--strategy.exits") + 1
        rest[at : at + 1] = rest[at].split(",") if at < len(rest) else []
    run(["tune", "--start", args[0], *rest])


TUNE_USAGE = """\
usage: ease tune CHECKPOINT [--exits 8,16] [--data D] [--out DIR] [options]

  CHECKPOINT    a Llama-family checkpoint (a folder, or a name on the Hugging Face hub) or the folder of a run
  --exits       layers after which a token may leave (at a third and two thirds of the depth by default)
  --data        text to learn from: a folder with train.txt and valid.txt, a text file, stdlib, hf:NAME/CONFIG
  --adapter     none or mlp: what learns beside each exit's norm
  --objective   cross-entropy, distillation or both
  --tokens      all, hard or kept: the tokens that the exits learn from

The backbone stays as it is, bit for bit. `ease run tune --help` shows every option; those of the strategy may be
given without their prefix here. Interrupted, the same command goes on.
"""


class Progress:
    """A bar per line at a terminal; elsewhere a text line per epoch."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.console = console
        self.bars = Bars(
            TextColumn("{task.description:28}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def line(self, name: str) -> Any:
        from ease.trainer import Watch

        task = self.bars.add_task(name, total=1.0, figures="")
        if not self.console.is_terminal:
            self.console.print(name)
        bars, console = self.bars, self.console

        class Line(Watch):
            def step(self, progress: float, loss: float = math.nan) -> None:
                bars.update(task, completed=progress)

            def epoch(self, row: Mapping[str, float]) -> None:
                figures = f"val PPL {row['val_ppl']:.2f}, acc {row['val_acc']:.1%}"
                bars.update(task, figures=figures)
                if not console.is_terminal:
                    console.print(f"  epoch {row['epoch']:3.0f}  {row['seconds']:6.1f} s  {figures}")

        return Line()


# ---------------------------------------------------------------------------------------------------------
# ease generate

COLOURS = ("green", "cyan", "blue", "magenta", "red", "yellow")


def generate(args: list[str]) -> None:
    from typing import Literal

    import torch
    import tyro
    from rich.console import Console
    from rich.text import Text
    from tokenizers.decoders import DecodeStream

    import ease
    from ease.generation import Token
    from ease.machine import choose_device
    from ease.runs import load_start

    @dataclass(frozen=True)
    class Arguments:
        """Continue a text and show at which exit each token was decided."""

        model: tyro.conf.Positional[str]
        """Folder of a run, or a Llama-family checkpoint (a folder, or a name on the Hugging Face hub)."""
        prompt: str
        """The text to continue."""
        mode: Literal["full", "routed", "exact"] | None = None
        """Every layer; leave where an exit is sure; or draft at an exit and check, which gives the tokens of full.
        (Routed by default, where the model has a policy.)"""
        max_new_tokens: int | None = None
        """Tokens to add at most (100 by default, or as many as the model has positions for)."""
        threshold: float | None = None
        """Confidence in [0, 1] at which a token leaves, at every exit (the model's own policy by default).
        For mode routed."""
        draft_exit: int | None = None
        """In mode exact, the exit that drafts (the fastest, as measured on the way, by default)."""
        temperature: float = 0.0
        """0 takes the likeliest token; otherwise one is drawn."""
        top_k: int | None = None
        """Draw among the k likeliest only."""
        top_p: float | None = None
        """Draw among the likeliest that together have this probability."""
        repetition_penalty: float = 1.0
        """Above 1 makes tokens that came before less likely."""
        seed: int | None = None
        """Of the draws."""
        device: str = "auto"
        """auto, cpu, cuda or mps."""

    given = tyro.cli(Arguments, args=args, prog="ease generate")
    check_text("the prompt", given.prompt)
    if given.threshold is not None and given.mode in ("full", "exact"):
        raise EaseError(f"--threshold is for mode routed, and this is {given.mode}: leave it out")
    model, tokenizer, eos = load_start(given.model)
    model.to(choose_device(given.device))
    if given.threshold is not None:
        exits = ease.Policy.own(model).exits or model.early_exits
        if not exits:
            raise EaseError(f"{given.model} has no exits to route at: leave out --threshold, or tune it first")
        model.exit_layer, model.routing_threshold = exits, (given.threshold,) * len(exits)
    routes = bool(ease.Policy.own(model).exits)
    if given.mode == "routed" and not routes:
        raise EaseError(f"{given.model} says at no exit who leaves: add --threshold, or use --mode full")
    mode = given.mode or ("routed" if routes else "full")
    ids = tokenizer.encode(given.prompt).ids
    if not ids:
        raise EaseError("the prompt is empty: give it a few words")
    most = model.config.max_positions
    fitting = 100 if most is None else max(1, min(100, most + 1 - len(ids)))

    console, stream = Console(highlight=False), DecodeStream(skip_special_tokens=True)
    colours: dict[int, str] = {}

    def show(token: Token) -> None:
        if not colours:  # not before the first token, so that nothing stands before a refusal
            console.print(Text(given.prompt), end="", soft_wrap=True)
        colour = colours.setdefault(token.exit, COLOURS[len(colours) % len(COLOURS)])
        if piece := stream.step(tokenizer, token.token):
            console.print(Text(piece, style=colour), end="", soft_wrap=True)

    answer = ease.generate(
        model,
        torch.tensor([ids]),
        fitting if given.max_new_tokens is None else given.max_new_tokens,
        mode,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        repetition_penalty=given.repetition_penalty,
        stop=() if eos is None else eos,
        seed=given.seed,
        stream=show,
        draft_exit="auto" if given.draft_exit is None else given.draft_exit,
    )
    console.print()
    shares = [(exit, answer.exits.eq(exit).double().mean().item()) for exit in sorted(colours)]
    where = ", ".join(f"[{colours[exit]}]layer {exit}: {share:.0%}[/]" for exit, share in shares)
    stats = answer.stats
    Console(stderr=True, highlight=False).print(
        f"{stats['tokens']} tokens, {stats['tokens_per_second']:.1f} a second; decided at {where}; "
        f"{stats['layers_per_token']:.1f} of {model.num_layers} layers run a token"
        + (f"; {stats['acceptance']:.0%} of the drafts accepted" if stats.get("acceptance") is not None else ""),
        soft_wrap=True,
    )


# ---------------------------------------------------------------------------------------------------------
# ease eval, ease calibrate, ease report, ease export


def evaluate(args: list[str]) -> None:
    import tyro
    from rich.console import Console
    from rich.table import Table

    from ease import finished

    def eval_(run: tyro.conf.Positional[Path], threshold: tuple[float, ...] = ()) -> tuple[Path, tuple[float, ...]]:
        """Score a run's model on its test split; routing really runs.

        Args:
            run: the run's folder.
            threshold: confidences in [0, 1] at which a token leaves, one evaluation each.
        """
        return run, threshold

    folder, thresholds = tyro.cli(eval_, args=args, prog="ease eval")
    with Progress(Console(stderr=True, highlight=False)) as progress:
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


def calibrate(args: list[str]) -> None:
    import tyro
    from rich.console import Console

    from ease import finished
    from ease.calibration import GOALS, Target

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
    with Progress(Console(stderr=True, highlight=False)) as progress:
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


def report(args: list[str]) -> None:
    import tyro

    from ease.report import write_report

    def report_(run: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> tuple[list[Path], Path | None]:
        """Write the report of one run, or of several side by side.

        Args:
            run: run folders.
            out: the HTML file (report.html in the run's folder, or in the current one for several runs).
        """
        return list(run), out

    folders, out = tyro.cli(report_, args=args, prog="ease report")
    if not folders:
        raise EaseError("no run given: ease report RUN [RUN ...]")
    default = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    print(f"The report: {write_report(folders, out or default)}")


def export(args: list[str]) -> None:
    import tyro

    from ease.checkpoint import load_model
    from ease.data import load_tokenizer
    from ease.finished import made_from
    from ease.hf import save_pretrained

    def export_(
        run: tyro.conf.Positional[Path],
        folder: tyro.conf.Positional[Path],
        tokenizer: str | None = None,
        overwrite: bool = False,
    ) -> tuple[Path, Path, str | None, bool]:
        """Write a run's model and tokenizer as a folder that stock transformers loads.

        Args:
            run: the run's folder.
            folder: where to write; exits and policy lie in its subfolder ease/.
            tokenizer: a checkpoint whose tokenizer files and special tokens go along, chat template included (the
                run's own tokenizer by default).
            overwrite: replace the folder if it holds a checkpoint or a run already.
        """
        return run, folder, tokenizer, overwrite

    run, folder, tokenizer, overwrite = tyro.cli(export_, args=args, prog="ease export")
    if folder.resolve() == run.resolve():
        raise EaseError(f"{folder} is the run itself: choose another folder")
    model, config = load_model(run)
    if model.config.max_positions is None and config["run"]:
        model.config = replace(model.config, max_positions=made_from(run, config).seq_len)
    own = load_tokenizer(run / "tokenizer.json")
    save_pretrained(
        model,
        folder,
        tokenizer=tokenizer or own,
        eos=config["data"].get("eos"),
        calibration=config["calibration"],
        overwrite=overwrite,
    )
    print(f"The checkpoint: {folder}")


# ---------------------------------------------------------------------------------------------------------
# ease reproduce


def reproduce(args: list[str]) -> None:
    import tyro

    @dataclass(frozen=True)
    class Arguments:
        """Train what is missing of a tier of the paper's experiments, and write its tables and figures.

        Tiers: smoke (everything, at a size that says nothing), 1 (every strategy against plain models at equal training
        FLOPs), 2 (ASHEM taken apart), 3 (tier 1's tables on what is given with --data and --model). What is trained is
        kept under OUT/TIER: the same command goes on where it was stopped. Tables say which lines are missing.
        """

        tier: tyro.conf.Positional[str]
        """smoke, 1, 2 or 3."""
        data: str | None = None
        """stdlib (by default), a folder with train.txt and valid.txt, a text file, wikitext-2, wikitext-103 or
        hf:NAME/CONFIG. For tier 3 a folder with train.jsonl, of texts with labels or of prompts with completions;
        .jsonl or .parquet files or hf:NAME/CONFIG, read as a stream of documents; or, with --model, any text."""
        model: str | None = None
        """For tier 3: a Llama-family checkpoint to put exits on (a folder, or a name on the Hugging Face hub)."""
        scales: str = ""
        """Sizes of model and data, with commas between them (those of the tier by default; for 3 tiny, s or l)."""
        seeds: str = "0,1,2"
        """With commas between them; the first one tries learning rates."""
        budget: float | None = None
        """Minutes after which no line is begun any more."""
        jobs: int = 1
        """Lines trained at a time, each on one thread."""
        device: str = "cpu"
        """cpu, cuda, mps or auto. The sizes that fit a laptop are faster on a CPU."""
        out: Path = Path("results/reproduce")
        """Where everything is kept."""

    given = tyro.cli(Arguments, args=args, prog="ease reproduce")
    root = Path(__file__).resolve().parents[2]
    if not (root / "experiments" / "reproduce.py").is_file():
        raise EaseError("the experiments do not come with the package: clone the repository and run ease from there")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    reproduce = importlib.import_module("experiments.reproduce")
    running = importlib.import_module("experiments.running")
    try:
        seeds = tuple(map(int, given.seeds.split(",")))
    except ValueError:
        raise EaseError(f"seeds are numbers with commas between them, as in 0,1,2; got {given.seeds!r}") from None
    try:
        settings = running.Settings(given.out, seeds, given.jobs, given.budget, given.device)
        scales = tuple(filter(None, given.scales.split(",")))
        missing = reproduce.reproduce(given.tier, given.data, scales, settings, given.model)
    except KeyboardInterrupt:
        raise EaseError("interrupted: what was trained is kept, and the same command goes on") from None
    if missing:
        print(f"Not done yet, the same command goes on: {'; '.join(missing)}")


if __name__ == "__main__":
    sys.exit(main())
