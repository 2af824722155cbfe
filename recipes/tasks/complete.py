"""Complete prompts (instructions, summaries): python recipes/tasks/complete.py --data FOLDER --out DIR

FOLDER has train.jsonl, valid.jsonl and test.jsonl with one record {"prompt": ..., "completion": ...} per line. Every
exit learns the tokens of the completion. The threshold is the cheapest one that costs no accuracy on validation; with
it the test split is scored once and compared with no routing.
"""

from pathlib import Path
from typing import Any

import torch
import tyro

import ease
from ease import Data, DeepSupervisionConfig, Policy, StandardTransformer, score, train
from ease.data import ExampleBatches, load_completion
from ease.data.tokenizers import save_tokenizer
from ease.devices import choose_device
from ease.errors import exit_on_error
from ease.evaluation.tasks import cheapest_policy, completion_metrics
from ease.progress import PrintProgress
from ease.runs.store import save_model
from ease.storage import output_folder, write_json

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)


def main(
    data: Path,
    out: Path = Path("runs/complete"),
    *,
    num_layers: int = 6,
    dim: int = 128,
    num_heads: int = 4,
    tokenizer: str = "bpe:2048",
    seq_len: int = 256,
    batch_size: int = 32,
    lr: float = 1e-3,
    max_epochs: int = 30,
    max_new_tokens: int = 64,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train, choose a threshold on validation, score the test split, and write a run folder.

    Args:
        data: folder with train.jsonl, valid.jsonl and test.jsonl.
        out: the run folder.
        num_layers: layers of the model.
        dim: width of the hidden state.
        num_heads: attention heads.
        tokenizer: bpe:N, word or byte.
        seq_len: longest prompt with completion, in tokens.
        batch_size: prompts per batch.
        lr: learning rate.
        max_epochs: largest number of epochs.
        max_new_tokens: largest number of tokens generated per prompt to measure ROUGE-L.
        seed: random seed of weights and batch order.
        device: auto, cpu, cuda or mps.
        overwrite: replace the folder if it holds a run.

    Returns:
        The content of summary.json.
    """
    with output_folder(out, overwrite) as folder:
        task = load_completion(data, tokenizer, seq_len=seq_len)
        learn = ExampleBatches(task.train, batch_size, shuffle=True, bucket=True, seed=seed)
        val = ExampleBatches(task.val, batch_size)
        torch.manual_seed(seed)
        model = StandardTransformer(task.tokenizer.get_vocab_size(), dim, num_layers, num_heads)
        config = DeepSupervisionConfig(num_layers=num_layers, lr=lr, max_epochs=max_epochs)
        where = choose_device(device)
        for _ in train(model, config.strategy(), Data(learn, val), device=where, progress=lambda _: PrintProgress()):
            pass

        exits = tuple(range(1, num_layers))
        policies = [Policy(exits, (threshold,) * len(exits)) for threshold in THRESHOLDS]
        chosen, tried = cheapest_policy(lambda policy: score(model, val, policy).metrics(), policies)
        model.policy = chosen
        test = {
            mode: completion_metrics(model, task, task.test, batch_size, mode=mode, max_new_tokens=max_new_tokens)
            for mode in ("full", "routed")
        }
        summary = {"validation": tried, "test": test}
        save_model(folder, model, chosen, ease_version=ease.__version__)
        save_tokenizer(task.tokenizer, folder / "tokenizer.json")
        write_json(folder / "summary.json", summary)
    print(f"\ntest split; confidence {chosen.thresholds[0] if chosen.exits else 'is not used'}, chosen on validation")
    for name, figures in summary["test"].items():
        print(
            f"{name:6}  ROUGE-L {figures['rouge_l']:.4f}  PPL {figures['ppl']:.3f}  accuracy {figures['acc']:.2%}  "
            f"leave early {figures['shallow_ratio']:.1%}  FLOPs/token {figures['flops_per_token']:,.0f}"
        )
    return summary


if __name__ == "__main__":
    with exit_on_error():
        tyro.cli(main)
