"""Options under which a run of a recipe takes seconds."""

SHORT = ["--data.seq-len", "16", "--data.batch-size", "8", "--data.epoch-batches", "8", "--data.eval-batches", "8"]
TINY = ["--model.dim", "16", "--model.num-heads", "2", "--data.tokenizer", "byte", *SHORT]
COMPARE = ["--compare", "continued", "standard", "deep-supervision", "--compare-layers"]  # at the depth of the strategy


def budget(flops: str) -> list[str]:
    """Options that give each phase this number of FLOPs."""
    return ["--strategy.phase1-max-flops", flops, "--strategy.phase2-max-flops", flops]
