"""Finished runs: open a run folder, start from it, export it, calibrate its thresholds, evaluate it again."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ease.data.batches import TokenBatches
from ease.data.corpus import Corpus
from ease.data.counts import CountTable
from ease.data.tokenizers import EOS, load_tokenizer
from ease.devices import choose_device, machine
from ease.errors import EaseError
from ease.evaluation import decoding_speed, policy_search
from ease.evaluation.calibration import Target
from ease.evaluation.scoring import score
from ease.hf.checkpoint import from_pretrained, save_pretrained
from ease.hf.folder import checkpoint_folder
from ease.hf.prompting import end_of_text, end_tokens
from ease.hf.prompting import load_tokenizer as load_checkpoint_tokenizer
from ease.interface import evaluation_view
from ease.models import DeepSupervisionTransformer, StandardTransformer
from ease.policy import Policy
from ease.progress import Progress, ProgressBatches
from ease.routing.confidence import measure_named
from ease.runs.config import SELF, DataConfig
from ease.runs.store import load_model, save_calibration, start_folder
from ease.runs.text import load_text
from ease.storage import MADE

if TYPE_CHECKING:
    from tokenizers import Tokenizer


LEARN_TOKENS = 2**15  # that calibration fits classifiers to: many times their parameters

COUNTS = "counts.safetensors"


class Start(NamedTuple):
    """A trained model to start from.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        eos: the id that ends a document of its training text, or None.
        stop: the ids that end a generated text.
        checkpoint: the folder with the files that a checkpoint has beside its weights (tokenizer, chat template,
            generation_config.json); None for a run with a tokenizer of its own.
    """

    model: DeepSupervisionTransformer
    tokenizer: Tokenizer
    eos: int | None
    stop: tuple[int, ...]
    checkpoint: Path | None


def load_start(name: str, dtype: str = "float32", *, split_special_tokens: bool | None = None) -> Start:
    """Load a trained model to start from.

    Args:
        name: a run folder, a checkpoint folder, or a name on the Hugging Face hub.
        dtype: dtype of the weights of a checkpoint.
        split_special_tokens: whether text that spells a special token stays text; by default as the run was trained,
            and for a checkpoint as in transformers.

    Raises:
        EaseError: there is no such model, it cannot be read, or it is a classifier.
    """
    folder = Path(name)
    if (folder / "summary.json").is_file():
        if dtype != "float32":
            raise EaseError(
                f"dtype {dtype} applies to a checkpoint, and {name} is a run with its own dtype: leave it out"
            )
        model, config = load_model(folder)
        if model.config.num_labels is not None:
            raise EaseError(f"{name} is a classifier, which generates no text: use a model that predicts tokens")
        tokenizer = _tokenizer_of(folder, model, config, split_special_tokens)
        data = config["data"]
        eos = data["eos"] if data.get("given") else tokenizer.token_to_id(EOS)
        checkpoint = start_folder(folder)
        stop = end_tokens(checkpoint) if checkpoint else () if eos is None else (eos,)
        return Start(model, tokenizer, eos, stop, checkpoint)
    folder = checkpoint_folder(name)
    model = from_pretrained(folder, dtype=dtype)
    tokenizer = load_checkpoint_tokenizer(folder, split_special_tokens=split_special_tokens)
    return Start(model, tokenizer, end_of_text(folder), end_tokens(folder), folder)


def _tokenizer_of(
    folder: Path, model: StandardTransformer, config: dict[str, Any], split_special_tokens: bool | None = None
) -> Tokenizer:
    """The tokenizer of a run, which reads special tokens in a text as in training unless stated."""
    if split_special_tokens is None:
        split_special_tokens = config["data"].get("split_special_tokens", True)  # as in runs that do not record it
    return load_tokenizer(folder / "tokenizer.json", model.config.vocab_size, split_special_tokens=split_special_tokens)


def count_table(folder: Path) -> CountTable:
    """The counts of a run's training text, made at the first call and kept in the run folder.

    Raises:
        EaseError: the run cannot be read, or its text has changed.
    """
    kept = folder / COUNTS
    if not kept.is_file():
        _, _, corpus, _ = open_run(folder)
        CountTable.of(corpus.train, corpus.vocab_size).save(kept)
    return CountTable.load(kept)


def open_run(
    folder: Path, *, calibrated: bool = True
) -> tuple[StandardTransformer, dict[str, Any], Corpus, DataConfig]:
    """Load the model of a run together with the corpus it was trained on.

    Args:
        folder: a run folder.
        calibrated: whether the model has the policy of policy.json, if there is one.

    Returns:
        The model, the content of config.json, the corpus, and the data configuration.

    Raises:
        EaseError: the run cannot be read, or its text has changed.
    """
    model, config = load_model(folder, calibrated=calibrated)
    model.to(choose_device("auto"))
    data = data_config_of(folder, config)
    corpus_hash, source = config["data"].get("hash"), config["data"].get("source", "an unrecorded source")
    given: Tokenizer | str = data.tokenizer
    if config["data"].get("given"):
        given = _tokenizer_of(folder, model, config)
    recorded = config["data"]
    surrounded = recorded.get("add_special_tokens", False)  # as in runs that do not record it
    own = source == SELF
    corpus = load_text(
        str(folder / MADE) if own else source,
        given,
        eos=recorded.get("eos"),
        add_special_tokens=surrounded,
        max_tokens=data.max_tokens,
        allow_overlap=data.allow_overlap or own,
    )
    if corpus.hash != corpus_hash:
        raise EaseError(f"the text of {corpus.name} is not what {folder} was trained on: restore it, or run again")
    return model, config, corpus, data


def data_config_of(folder: Path, config: dict[str, Any]) -> DataConfig:
    """The DataConfig that a run was trained with."""
    try:
        recorded = config["run"]["data"]
        return DataConfig(**{**recorded, "seq_len": recorded["seq_len"]})  # required, although it has a default
    except (KeyError, TypeError, EaseError) as error:
        raise EaseError(f"{folder} does not record its data configuration ({error}): run again") from error


def export(
    folder: Path, out: Path, *, tokenizer: str | os.PathLike[str] | None = None, overwrite: bool = False
) -> None:
    """Write the model and tokenizer of a run as a checkpoint that stock transformers loads.

    Args:
        folder: the run folder.
        out: the folder to create.
        tokenizer: a checkpoint whose tokenizer, special tokens, chat template and generation settings to copy (by
            default those of the checkpoint that the run started from, or else the run's own tokenizer).
        overwrite: replace `out` if it is a checkpoint or a run.

    Raises:
        EaseError: the run cannot be read, no stock model has its shape, or `out` exists or cannot be written.
    """
    model, config = load_model(folder)
    if model.config.max_positions is None and config["run"]:
        model.config = replace(model.config, max_positions=data_config_of(folder, config).seq_len)
    own = _tokenizer_of(folder, model, config)
    save_pretrained(
        model,
        out,
        tokenizer=tokenizer or start_folder(folder) or own,
        eos=config["data"].get("eos"),
        calibration=config["calibration"],
        overwrite=overwrite,
        reads=[folder],
    )


def calibration_halves(ids: torch.Tensor, data: DataConfig, split: str = "test split") -> tuple[list[Any], list[Any]]:
    """Split sequences at random into two halves.

    Of the test split one decides and the other reports; of the validation split one teaches classifiers and the other
    proposes thresholds. With a random split, a bound on the mean over all sequences holds by the draw, however
    different the texts are.

    Args:
        ids: (N,) token ids of the split.
        data: the data configuration; `eval_batches` limits each half.
        split: the name of the split, for the message.

    Returns:
        Batches of the two halves.

    Raises:
        EaseError: the split fills fewer than two batches.
    """
    limit = data.eval_batches and 2 * data.eval_batches
    drawn = list(TokenBatches(ids, data.seq_len, data.batch_size, shuffle=True, max_batches=limit))
    if len(drawn) < 2:
        raise EaseError(f"calibration needs two batches and the {split} fills one: run again with more text")
    return drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]


def calibrate(
    folder: Path,
    target: Target,
    progress: Callable[[str], Progress] = lambda name: Progress(),
    *,
    exits: Sequence[int] = (),
    measure: str | None = None,
) -> dict[str, Any]:
    """Choose exits, a confidence measure and thresholds for a run, and store them as its policy.

    If no policy that meets the target saves FLOPs and time, an empty one is stored: the run stays at full depth. Of
    validation, which training used for stopping, one half teaches classifiers and the other proposes candidates. One
    half of the test split chooses among them, and the reported metrics are those of the other half.

    Args:
        folder: the run folder.
        target: the target to meet.
        progress: makes the progress of a named piece of work.
        exits: exits to search (all trained exits by default).
        measure: the only measure to search: one of `ease.routing.confidence.MEASURES`, or "agreement" or "gain" for a
            classifier that is trained here. By default the run's own, max-probability, margin, agreement, and gain.

    Returns:
        The content of policy.json.

    Raises:
        EaseError: the run has no such exits, the measure is unknown, the run cannot be read or written, or no threshold
            meets the target.
    """
    model, _, corpus, data = open_run(folder, calibrated=False)
    own = model.policy
    trained = tuple(sorted({*own.exits, *model.early_exits}))
    if not trained:
        raise EaseError(
            f"{folder} has no exits to calibrate: tune it first (ease tune), or train with a strategy that has exits"
        )
    if others := sorted(set(exits) - set(trained)):
        raise EaseError(f"{folder} has no trained exit {others[0]}: choose among {', '.join(map(str, trained))}")
    measures = (own.confidence, *policy_search.MEASURES) if measure is None else (measure,)
    if measure is not None and measure not in policy_search.LEARNED:
        measure_named(measure)
    if measure == "patience" and own.confidence != measure:
        raise EaseError("the run has no policy with the measure patience: choose another measure")
    learn, propose = calibration_halves(corpus.val, data, "validation split")
    found = policy_search.search(
        model,
        target,
        sorted(set(exits)) or trained,
        measures,
        learn[: max(1, LEARN_TOKENS // (data.batch_size * data.seq_len))],
        propose,
        *calibration_halves(corpus.test, data),
        progress("calibrating"),
        decoding_speed.time_shares,
    )
    where = machine(str(next(model.parameters()).device))
    return save_calibration(folder, found.model, found.record | {"machine": where})


def evaluate(
    folder: Path, thresholds: list[float], progress: Callable[[str], Progress] = lambda name: Progress()
) -> list[dict[str, Any]]:
    """Evaluate a run on its test split, at its own thresholds or at given ones.

    A calibrated run is evaluated on the half of the test split that did not choose its thresholds.

    Args:
        folder: the run folder.
        thresholds: thresholds common to all exits, one evaluation each; empty means the run's own policy.
        progress: makes the progress of a named piece of work.

    Returns:
        One row of metrics per threshold, with "thresholds", "split", and "flops_share" and "time_share": the FLOPs of
        the row and the time of decoding with its policy, as shares of those at full depth.

    Raises:
        EaseError: the run cannot be read, or thresholds are given and it has no exits.
    """
    model, config, corpus, data = open_run(folder)
    test: Any = TokenBatches(corpus.test, data.seq_len, data.batch_size, max_batches=data.eval_batches)
    split = "test split"
    if config["calibration"]:
        test, split = (
            calibration_halves(corpus.test, data)[1],
            "half of the test split that was not used for calibration",
        )
    own = model.policy
    exits = own.exits or model.early_exits
    if thresholds and not exits:
        raise EaseError(
            f"{folder} has no exits to route at: leave out --threshold, or train with a strategy that has exits"
        )
    policies = [Policy.of(exits, (t,) * len(exits), **own.options) for t in thresholds] or [own]
    batches = ProgressBatches(test, progress("scoring"), epochs=len(policies) + 1)
    full = score(model, batches)
    views = [evaluation_view(model) for policy in policies if policy.exits]
    for view, policy in zip(views, filter(lambda policy: policy.exits, policies), strict=True):
        view.policy = policy
    times = iter(decoding_speed.time_shares(views, test))
    rows = []
    for policy in policies:
        scores = score(model, batches, policy) if policy.exits else full
        shares = {"flops_share": scores.flops / full.flops, "time_share": next(times) if policy.exits else 1.0}
        rows.append({"thresholds": policy.thresholds, "split": split, **scores.metrics(), **shares})
    return rows
