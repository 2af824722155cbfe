"""`ease tune`: add exits to a finished model whose backbone does not change."""

from ease.cli import run
from ease.errors import EaseError

USAGE = "CHECKPOINT --exits 8,16 [--data D] [--out DIR]"
HELP = "give exits to a finished model; its backbone does not change"


OPTIONS = """\
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


def main(args: list[str]) -> None:
    """`ease run tune` with a checkpoint to start from and the strategy's options under short names."""
    from dataclasses import fields

    from ease.strategies.exit_tuning import TuneConfig

    if args[:1] in ([], ["-h"], ["--help"]):
        print(OPTIONS, end="")
        return
    if args[0].startswith("-"):
        raise EaseError("name the checkpoint first: ease tune CHECKPOINT --exits 8,16")
    rest = [part for arg in args[1:] for part in (arg.split("=", 1) if arg.startswith("--exits=") else [arg])]
    rest = run.spell_out(rest, {f"--{f.name.replace('_', '-')}": f"--strategy.{f.name}" for f in fields(TuneConfig)})
    if "--strategy.exits" in rest:
        at = rest.index("--strategy.exits") + 1
        rest[at : at + 1] = rest[at].split(",") if at < len(rest) else []
    run.main(["tune", "--start", args[0], *rest])
