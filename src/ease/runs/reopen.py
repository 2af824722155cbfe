"""A finished run: open its folder, calibrate its thresholds, evaluate it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ease.data.batches import TokenBatches
from ease.data.corpus import Corpus, load_corpus
from ease.data.tokenizers import EOS, load_tokenizer
from ease.devices import choose_device
from ease.errors import EaseError
from ease.evaluation import calibration
from ease.evaluation.calibration import Target
from ease.evaluation.scoring import score
from ease.hf.checkpoint import end_of_text, from_pretrained
from ease.hf.checkpoint import load_tokenizer as load_checkpoint_tokenizer
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.progress import Progress, ProgressBatches
from ease.runs.config import DataConfig
from ease.runs.store import load_model, save_calibration

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_start(name: str, dtype: str = "float32") -> tuple[StandardTransformer, Tokenizer, int | None]:
    """The model to start from, its tokenizer, and the id that ends a text."""
    folder = Path(name)
    if (folder / "summary.json").is_file():
        if dtype != "float32":
            raise EaseError(f"dtype {dtype} is that of a checkpoint, and {name} is a run with its own: leave it out")
        model, config = load_model(folder)
        if model.config.num_labels is not None:
            raise EaseError(f"{name} is a classifier, which writes no text: use a model that predicts tokens")
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        data = config["data"]
        return model, tokenizer, data["eos"] if data.get("given") else tokenizer.token_to_id(EOS)
    return from_pretrained(name, dtype=dtype), load_checkpoint_tokenizer(name), end_of_text(name)


def open_run(folder: Path) -> tuple[StandardTransformer, dict[str, Any], Corpus, DataConfig]:
    """The model of a run with its configuration, and the text it was made from."""
    model, config = load_model(folder)
    model.to(choose_device("auto"))
    data = data_config_of(folder, config)
    corpus_hash, source = config["data"].get("hash"), config["data"].get("source", "a source that is not told")
    given = load_tokenizer(folder / "tokenizer.json") if config["data"].get("given") else data.tokenizer
    corpus = load_corpus(source, given, eos=config["data"].get("eos"), max_tokens=data.max_tokens)
    if corpus.hash != corpus_hash:
        raise EaseError(f"the text of {corpus.name} is not what {folder} was trained on: restore it, or run again")
    return model, config, corpus, data


def data_config_of(folder: Path, config: dict[str, Any]) -> DataConfig:
    """How the text was cut that a run was made from."""
    try:
        told = config["run"]["data"]
        return DataConfig(**{**told, "seq_len": told["seq_len"]})  # which has to be there, whatever the default
    except (KeyError, TypeError, EaseError) as error:
        raise EaseError(f"{folder} does not say what data it was made from ({error}): run again") from error


def calibration_halves(test: torch.Tensor, data: DataConfig) -> tuple[list[Any], list[Any]]:
    """Batches of a test split, its sequences drawn into two halves: to calibrate on, and to measure the outcome on.

    Drawn, and not cut in the middle: a bound on the mean over all sequences then holds by the draw, however unlike the
    texts are.
    """
    most = data.eval_batches and 2 * data.eval_batches
    drawn = list(TokenBatches(test, data.seq_len, data.batch_size, shuffle=True, max_batches=most))
    if len(drawn) < 2:
        raise EaseError("the test split fills one batch, and calibration needs two: run again with more text")
    return drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]


def calibrate(
    folder: Path, target: Target, progress: Callable[[str], Progress] = lambda name: Progress()
) -> dict[str, Any]:
    """Chooses thresholds for a run's exits and makes them its policy; returns what its policy.json then holds.

    Validation, which training has stopped by, only proposes. One half of the test split decides, and the figures are
    those of the other half.
    """
    model, _, corpus, data = open_run(folder)
    exits = Policy.own(model).exits or model.early_exits
    if not exits:
        raise EaseError(f"{folder} has no exits to calibrate: tune it first (ease tune), or use a strategy that has")
    policy = replace(Policy.own(model), exits=exits, thresholds=(1.0,) * len(exits))
    val = TokenBatches(corpus.val, data.seq_len, data.batch_size, max_batches=data.eval_batches)
    found = calibration.calibrate(
        model, policy, target, val, *calibration_halves(corpus.test, data), progress("calibrating")
    )
    return save_calibration(folder, model, found.record)


def evaluate(
    folder: Path, thresholds: list[float], progress: Callable[[str], Progress] = lambda name: Progress()
) -> list[dict[str, Any]]:
    """The figures of a run's model on its test split, routed at its own thresholds or at others.

    Of a calibrated run, on the half of the test split that its thresholds were not chosen on.

    Args:
        thresholds: common to all exits, one evaluation each; none means the run's own policy.
    """
    model, config, corpus, data = open_run(folder)
    test: Any = TokenBatches(corpus.test, data.seq_len, data.batch_size, max_batches=data.eval_batches)
    split = "test split"
    if config["calibration"]:
        test, split = calibration_halves(corpus.test, data)[1], "half of the test split that chose no threshold"
    own = Policy.own(model)
    exits = own.exits or model.early_exits
    if thresholds and not exits:
        raise EaseError(f"{folder} has no exits to route at: leave out --threshold, or train with a strategy that has")
    policies = [Policy.of(exits, (t,) * len(exits), **own.options) for t in thresholds] or [own]
    watched = ProgressBatches(test, progress("scoring"), epochs=len(policies))
    return [
        {"thresholds": policy.thresholds, "split": split, **score(model, watched, policy).figures()}
        for policy in policies
    ]
