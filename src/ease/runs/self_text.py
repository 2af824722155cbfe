"""Training text that the model makes itself: continuations of prompts, sampled in batches.

A draft is accepted if the model itself would have said it, so a model's own text is what drafts are trained on. The
text is a folder of the run with train.jsonl, valid.jsonl and test.jsonl, no two of which have a prompt in common.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ease.data.sources import FILE_NAMES, SPLITS, read_splits
from ease.data.tokenizers import surrounding_tokens
from ease.errors import EaseError
from ease.generation.decode import generate
from ease.hf.prompting import sampling_defaults
from ease.progress import Progress
from ease.runs.config import SELF, DataConfig
from ease.runs.reopen import Start
from ease.storage import MADE, digest, fingerprint, has_checkpoints, read_json, write_json
from ease.training.distributed import process

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENS = 200_000  # of the train split, if the run does not limit them

ROWS = 32  # texts that are made at a time

PROMPT_SHARE = 8  # a text is this many times as long as its prompt

PLAN = "plan.json"  # what the text was made from


def self_text(
    data: DataConfig, start: Start, folder: Path, *, seed: int, overwrite: bool = False, progress: Progress
) -> Path:
    """The folder of the text that a model made from prompts; what is there already is not made again.

    A text has `data.seq_len` tokens, or fewer if the model ends it; an eighth of them are its prompt. Train has
    `data.max_tokens` tokens (200,000 by default), validation and test a tenth each, and at least a batch.

    Args:
        data: its source is "self:PROMPTS", where PROMPTS is a source of text: in a text file each line is a prompt,
            and every other source is cut into prompts.
        start: the model, which is used on the device where it is.
        folder: the folder of the run.
        seed: random seed of the sampling.
        overwrite: discard text of another plan that an unfinished run is trained on.
        progress: receives the share that is done.

    Raises:
        EaseError: the prompts cannot be read, are too few for another text at temperature 0, or an unfinished run is
            trained on text of another plan.
    """
    source, out = data.source.removeprefix(SELF), folder / MADE
    prompts = read_prompts(source, start.tokenizer, max(1, data.seq_len // PROMPT_SHARE), data.allow_overlap)
    train = data.max_tokens or TOKENS
    held_out = max(train // 10, data.seq_len * data.batch_size + 1)
    sizes = {split: train if split == "train" else held_out for split in SPLITS}
    sampling = sampling_of(data, start)
    plan = {"plan": digest(fingerprint(start.model), prompts, sizes, data.seq_len, sampling, start.stop, seed)}
    if (out / PLAN).is_file() and read_json(out / PLAN) != plan:
        if has_checkpoints(folder) and not overwrite:
            raise EaseError(
                f"{folder} holds an unfinished run on text from other prompts or settings: finish it with its own "
                "command, choose another --out, or discard it (--overwrite)"
            )
        shutil.rmtree(out)
    if process():
        return out  # the first process has made it
    if not out.is_dir():
        out.mkdir()
        write_json(out / PLAN, plan)
    total, done = sum(sizes.values()), 0
    for number, split in enumerate(SPLITS):
        made = _Split(out / f"{FILE_NAMES[split]}.jsonl", prompts[split], min(ROWS, -(-sizes[split] // data.seq_len)))
        while made.tokens < sizes[split]:
            progress.step((done + made.tokens) / total)
            batch = made.next_prompts(greedy=sampling["temperature"] == 0, source=source)
            options = dict(sampling)
            if sampling["temperature"]:
                options["seed"] = int(np.random.SeedSequence([seed, number, made.batches]).generate_state(1)[0])
            made.append(continue_all(start, batch, data.seq_len, options))
        done += sizes[split]
    progress.step(1.0)
    return out


def sampling_of(data: DataConfig, start: Start) -> dict[str, Any]:
    """The sampling settings: the checkpoint's own, or temperature 1; with a given temperature, that one."""
    own, _ = ({}, []) if start.checkpoint is None else sampling_defaults(start.checkpoint)
    if data.temperature is None:
        return {"temperature": 1.0} | own
    if data.temperature == 0:
        own = {}
    return own | {"temperature": data.temperature}


def read_prompts(source: str, tokenizer: Tokenizer, length: int, allow_overlap: bool) -> dict[str, list[list[int]]]:
    """Split -> the ids of its prompts, each of at most `length` tokens beside those that the tokenizer adds."""
    before, _ = surrounding_tokens(tokenizer, None)
    lines = Path(source).is_file() and Path(source).suffix == ".txt"
    prompts: dict[str, list[list[int]]] = {}
    for split, documents in read_splits(source, allow_overlap=allow_overlap).items():
        texts = [line for text in documents for line in text.splitlines()] if lines else documents
        found = []
        for encoding in tokenizer.encode_batch([text for text in texts if text.strip()], add_special_tokens=False):
            ids = encoding.ids
            starts = range(0, 1 if lines else len(ids), 2 * length)  # every other piece, so that none continues another
            found += [before + ids[at : at + length] for at in starts]
        if not found:
            raise EaseError(f"{source} leaves the {split} split without a prompt: give more of them")
        prompts[split] = found
    return prompts


class _Split:
    """The text of one split, as far as it is made."""

    def __init__(self, file: Path, prompts: list[list[int]], rows: int) -> None:
        self.file, self.prompts, self.rows = file, prompts, rows
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]
        self.batches = len(whole) // rows  # the last one may have been cut off by a kill
        kept = whole[: self.batches * rows]
        if len(kept) < len(lines):
            file.write_text("".join(kept), encoding="utf-8")
        self.tokens = sum(json.loads(line)["tokens"] for line in kept)

    def next_prompts(self, greedy: bool, source: str) -> list[list[int]]:
        """The prompts of the next batch, in turn."""
        first, count = self.batches * self.rows, len(self.prompts)
        if greedy and first >= count:
            raise EaseError(
                f"{source} has {count} prompts for {self.file.stem}, which at temperature 0 give one text each: give "
                "more prompts, a temperature above 0 or a smaller max_tokens"
            )
        return [self.prompts[i % count] for i in range(first, first + self.rows)]

    def append(self, records: list[Mapping[str, Any]]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
        self.batches += 1
        self.tokens += sum(record["tokens"] for record in records)


def continue_all(
    start: Start, prompts: list[list[int]], seq_len: int, options: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """The text of each prompt with what follows it, and its number of tokens."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    real = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        real[row, longest - len(prompt) :] = 1
    new = max(1, seq_len - longest)
    answer = generate(start.model, ids, new, attention_mask=real, stop=start.stop, **options)
    lengths = (answer.exits >= start.model.first_exit).sum(1).tolist()
    texts = [prompt + row[:n] for prompt, row, n in zip(prompts, answer.tokens.tolist(), lengths, strict=True)]
    return [{"text": start.tokenizer.decode(text), "tokens": len(text)} for text in texts]
