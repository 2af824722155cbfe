"""The Trainer of transformers: losses are those of stock Llama with equal weights, in every setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from ease.hf.model import EaseForCausalLM  # noqa: E402

V = 53

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2},
    "bfloat16": {"bf16": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
    "noise on embeddings": {"neftune_noise_alpha": 5},
    "evaluation and the best checkpoint": {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
    },
    "documents without padding": {"collator": "flat"},
}


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    shape = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_attention_heads=4)).save_pretrained(folder)
    return folder


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    T = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (T - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("setting", SETTINGS)
def test_losses_are_those_of_stock_llama(stock_folder: Path, tmp_path: Path, setting: str) -> None:
    options = dict(SETTINGS[setting])
    flat = options.pop("collator", None) == "flat"
    rows = [torch.randint(1, V, (length,)).tolist() for length in (5, 9, 3, 7, 6, 4, 8, 5)]
    data = [{"input_ids": row, "labels": row} if flat else {"input_ids": row} for row in rows]
    losses = []
    for kind in (transformers.LlamaForCausalLM, EaseForCausalLM):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / kind.__name__),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
            **{"save_strategy": "no"} | options,
        )
        torch.manual_seed(0)
        trainer = transformers.Trainer(
            kind.from_pretrained(stock_folder),
            arguments,
            train_dataset=data,
            eval_dataset=data[:4],
            data_collator=transformers.DataCollatorWithFlattening() if flat else padded,
        )
        trainer.train()
        trained = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        losses.append([*trained, trainer.evaluate()["eval_loss"]])
    assert losses[1] == pytest.approx(losses[0], abs=5e-3 if setting == "bfloat16" else 1e-3)
