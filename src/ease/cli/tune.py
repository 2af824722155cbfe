"""`ease tune`: add exits or a draft brick to a trained model; its backbone does not change."""

from ease.cli import run
from ease.errors import EaseError

USAGE = "CHECKPOINT --exits 8,16 [--data D] [--out DIR]"
HELP = "add exits or a draft brick to a model, whose backbone stays as it is"


OPTIONS = """\
usage: ease tune CHECKPOINT [--exits 8,16] [--data D] [--out DIR] [options]

  CHECKPOINT    Llama-family checkpoint (a folder, a name on the Hugging Face
                hub, or a GGUF file), or a run folder
  --exits       layers after which a token may exit (by default at a third and
                at two thirds of the depth)
  --data        training text: a folder with train.txt and valid.txt, a text
                file, a .jsonl, .json, .csv, .tsv or .parquet file with a column
                "text", stdlib, hf:NAME/CONFIG; or self:PROMPTS, text that the
                model makes from prompts: the lines of a text file, or the parts
                of any other of these
  --adapter     none or mlp: what is trained in addition to each exit's norm.
                brick: a draft brick instead of exits, which drafts for
                `ease generate --mode exact`
  --objective   cross-entropy, distillation or both
  --tokens      all, hard or kept: the tokens that the exits are trained on

The backbone does not change by a single bit. `ease run tune --help` shows every
option, and `ease run brick --help` those with --adapter brick; the options of
the strategy may be given without their prefix here. A tuning that was
interrupted resumes with the same command.
"""

SPLIT = ("--exits=", "--adapter=")  # options whose value is read here


def main(args: list[str]) -> None:
    """Execute `ease run tune`, or `ease run brick`, on a checkpoint, with short names for the strategy's options."""
    from ease.strategies.draft_brick import BrickConfig
    from ease.strategies.exit_tuning import TuneConfig

    if args[:1] in ([], ["-h"], ["--help"]):
        print(OPTIONS, end="")
        return
    if args[0].startswith("-"):
        raise EaseError("name the checkpoint first: ease tune CHECKPOINT --exits 8,16")
    rest = [part for arg in args[1:] for part in (arg.split("=", 1) if arg.startswith(SPLIT) else [arg])]
    config: type[BrickConfig | TuneConfig] = TuneConfig
    at = rest.index("--adapter") if "--adapter" in rest else len(rest)
    if rest[at + 1 : at + 2] == ["brick"]:
        config, rest = BrickConfig, rest[:at] + rest[at + 2 :]
    short = {f"--{name}": f"--strategy.{name}" for name in run.option_names(config)}
    rest = run.expand_options(rest, short)
    if "--strategy.exits" in rest:
        at = rest.index("--strategy.exits") + 1
        rest[at : at + 1] = rest[at].split(",") if at < len(rest) else []
    run.main([config.name, "--start", args[0], *rest])
