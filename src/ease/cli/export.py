"""`ease export`: write a run's model as a checkpoint of stock transformers."""

from pathlib import Path

USAGE = "RUN DIR [--tokenizer C] [--overwrite]"
HELP = "write a run's model as a stock transformers checkpoint"


def main(args: list[str]) -> None:
    """Write a run's model and tokenizer as a checkpoint folder."""
    import tyro

    from ease.runs.reopen import export

    def export_(
        run: tyro.conf.Positional[Path],
        folder: tyro.conf.Positional[Path],
        tokenizer: str | None = None,
        overwrite: bool = False,
    ) -> tuple[Path, Path, str | None, bool]:
        """Write a run's model and tokenizer as a folder that stock transformers loads.

        Args:
            run: the run folder.
            folder: the folder to write; exits and policy are in its subfolder ease/.
            tokenizer: checkpoint whose tokenizer files, special tokens, chat template and generation settings to copy
                (by default those of the checkpoint that the run started from, or else the run's own tokenizer).
            overwrite: replace the folder if it holds a checkpoint or a run.
        """
        return run, folder, tokenizer, overwrite

    run, folder, tokenizer, overwrite = tyro.cli(
        export_, args=args, prog="ease export", config=(tyro.conf.FlagCreatePairsOff,)
    )
    export(run, folder, tokenizer=tokenizer, overwrite=overwrite)
    print(f"Checkpoint: {folder}")
