"""lm-evaluation-harness: scores equal those of stock transformers, batched and padded, and the compute is reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ease
from ease.data.tokenizers import train_tokenizer
from ease.errors import EaseError
from ease.flops import exit_flops, full_depth_flops, layer_flops, run_flops
from ease.models import DeepSupervisionTransformer
from ease.policy import Policy
from ease.routing.forward import route

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # imports of the harness warn
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from ease.hf.lm_eval import EaseLM, main

# The harness and its dependencies emit warnings of their own.
pytestmark = pytest.mark.filterwarnings("ignore")

PAIRS = [("def f(x):\n    return", " x"), ("import", " json and more"), ("", "class A"), ("for i in range", "(3):\n")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose exits are confident of some bytes and not of others."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer("byte", [])
    model = DeepSupervisionTransformer(tokenizer.get_vocab_size(), 32, 3, 4, max_positions=48).eval()
    with torch.no_grad():
        model.output_head.weight *= 30
    model.trained_exits = {1, 2, 3}
    out = tmp_path_factory.mktemp("lm") / "model"
    ease.save_pretrained(model, out, tokenizer=tokenizer)
    return out


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_without_routing_scores_equal_those_of_stock_transformers(folder: Path, batch_size: int) -> None:
    lm, stock = EaseLM(str(folder), batch_size=batch_size), HFLM(str(folder), device="cpu", batch_size=batch_size)
    a = lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    b = stock.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    assert [x[0] for x in a] == pytest.approx([x[0] for x in b], rel=1e-4)
    assert [x[1] for x in a] == [x[1] for x in b]
    long = instances("loglikelihood_rolling", [("some text that is longer than the 48 positions of the model " * 2,)])
    assert lm.loglikelihood_rolling(long) == pytest.approx(stock.loglikelihood_rolling(long), rel=1e-4)
    questions = [(context or "x", {"until": ["\n"], "max_gen_toks": 5}) for context, _ in PAIRS]
    assert lm.generate_until(instances("generate_until", questions), True) == stock.generate_until(
        instances("generate_until", questions), True
    )


def test_routed_scores_and_compute_equal_those_of_the_routed_model(
    folder: Path, even_policy: Callable[..., Policy]
) -> None:
    model = ease.from_pretrained(folder)
    tokenizer = ease.hf.load_tokenizer(folder)
    text = "def f(x):\n    return x"
    ids = torch.tensor(tokenizer.encode(text).ids)
    policy = even_policy(model, ids[None, :-1], (1, 2))
    lm = EaseLM(str(folder), list(policy.thresholds), "1+2", batch_size=2)
    [(total, greedy), _] = lm.loglikelihood(instances("loglikelihood", [("def f(x", text[7:]), ("a", "b")]), True)
    routed = route(model, ids[None, :-1], policy.exits, policy.thresholds)
    start = len(tokenizer.encode("def f(x").ids) - 1
    logs = routed.logits.log_softmax(-1)[0].gather(1, ids[1:, None])[start:]
    assert total == pytest.approx(logs.sum().item(), rel=1e-4)
    assert not greedy
    alone = route(model, torch.tensor([tokenizer.encode("a").ids]), policy.exits, policy.thresholds).exits
    exits = torch.cat([routed.exits[0, start:], alone[0]])
    assert len(exits.unique()) > 1
    assert lm.compute["layers_run"] == pytest.approx(exits.float().mean().item() / 3)
    assert lm.compute["tokens_run"] == len(ids), "padding is not counted"


@pytest.mark.parametrize("routing", [True, False])
def test_the_compute_of_generation_follows_the_cache(
    folder: Path, even_policy: Callable[..., Policy], routing: bool
) -> None:
    tokenizer = ease.hf.load_tokenizer(folder)
    prompts, new = ["def f(x):\n    return", "import json and", "x"], 8
    rows = [tokenizer.encode(prompt).ids for prompt in prompts]
    T = max(map(len, rows))
    ids = torch.tensor([[0] * (T - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])
    model = ease.from_pretrained(folder)
    policy = even_policy(model, ids[:1], (1, 2)) if routing else Policy()
    lm = EaseLM(str(folder), list(policy.thresholds) or 0.0, "+".join(map(str, policy.exits)) or None, batch_size=3)
    questions = [(prompt, {"until": ["?!?!"], "max_gen_toks": new}) for prompt in prompts]
    lm.generate_until(instances("generate_until", questions), True)

    # The last token is not read; all others are, each once.
    read = lm.model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)[:, :-1]
    assert read.shape[1] == T + new - 1
    real = torch.cat([mask, torch.ones(3, new - 1)], 1).bool()
    exits = real * 3
    if routing:
        exits = route(model, read, policy.exits, policy.thresholds, attention_mask=real).exits
        assert len(exits[:, T:].unique()) == 3
    sampled, flops = exits[:, T - 1 :], 0.0
    for layer in (1, 2, 3):
        for row, there in zip(exits >= layer, real):
            # A row has keys and values of all tokens up to its last one that reached the layer.
            deepest = int(row.nonzero().max()) + 1 if row.any() else 0
            positions = there.cumsum(0) - 1
            pairs = int((positions[row] + 1).sum())
            flops += layer_flops(model.config, int(there[:deepest].sum()), int(row.sum()), pairs)
        heads = (sampled == 3) if layer == 3 else (exits >= layer) & routing
        flops += exit_flops(model.config, int(heads.sum()), layer)
    assert lm.flops == pytest.approx(flops)
    assert lm.compute["layers_run"] == pytest.approx(sampled.float().mean().item() / 3)
    assert (lm.processed, lm.predicted) == (int(real.sum()), 3 * new)


def test_a_measure_without_head_costs_a_head_only_where_a_token_leaves(folder: Path) -> None:
    lm = EaseLM(str(folder), 0.5, 1)
    lm.model.model.policy = replace(lm.model.model.policy, confidence="steadiness")
    text, (model, T) = "def f(x):", (lm.model.model, 9)
    ids = torch.tensor([ease.hf.load_tokenizer(folder).encode(text).ids])
    for threshold in (1e-9, 1.0):  # all tokens leave, then none
        lm.model.set_routing(threshold, 1)
        lm.flops = 0.0
        lm.generate_until(instances("generate_until", [(text, {"until": ["\n"], "max_gen_toks": 1})]), True)
        leave = threshold < 1
        layers = 1 if leave else model.num_layers
        expected = run_flops(model.config, layers, torch.ones_like(ids, dtype=torch.bool))
        assert ids.shape[1] == T
        # The last exit evaluates only the last token.
        assert lm.flops == pytest.approx(expected + exit_flops(model.config, T if leave else 1, layers))


def test_at_full_depth_every_token_costs_every_layer(folder: Path) -> None:
    lm = EaseLM(str(folder))
    lm.loglikelihood(instances("loglikelihood", [("abc", "defgh")]), disable_tqdm=True)
    assert lm.compute["layers_run"] == 1.0
    assert lm.compute["flops_per_token"] == pytest.approx(full_depth_flops(lm.model.model.config, 7))
    with pytest.raises(EaseError, match="max_length"):
        lm.loglikelihood(instances("loglikelihood", [("a", "b" * 60)]), disable_tqdm=True)


def test_bad_input_is_one_sentence_and_exit_code_2(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in (
        ({"routing_threshold": 0.5, "exits": "1+7"}, "exit_layer 7 must lie below the last"),
        ({"exits": "1+2"}, "exits need a routing_threshold"),
        ({"routing_threshold": "abc"}, "routing_threshold must be a number and exits layers"),
        ({"routing_threshold": 0.5, "exits": "a"}, "routing_threshold must be a number and exits layers"),
        ({"dtype": "float99"}, "no dtype 'float99'"),
        ({"device": "tpu"}, "no device 'tpu'"),
    ):
        monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda options=options: EaseLM(str(folder), **options))
        assert main() == 2
        assert capsys.readouterr().err.startswith(f"ease: {message}")


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{more}
"""


def test_the_command_line_runs_tasks_made_of_local_files(folder: Path, tmp_path: Path) -> None:
    rows = [{"question": f"{i} + 1 =", "choices": [f" {i + 1}", " no"], "answer": 0} for i in range(4)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\nmetric_list:\n  - metric: acc'
    generate = 'doc_to_target: "{{choices[0]}}"\ngeneration_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 4\n'
    generate += "metric_list:\n  - metric: exact_match"
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "choose.yaml").write_text(TASK.format(name="choose", data=data, kind="multiple_choice", more=choice))
    (tasks / "write.yaml").write_text(TASK.format(name="write", data=data, kind="generate_until", more=generate))
    arguments = [
        *("--model", "ease", "--model_args", f"pretrained={folder},routing_threshold=0.3,exits=1+2"),
        *("--tasks", "choose,write", "--include_path", str(tasks), "--batch_size", "3"),
        *("--output_path", str(tmp_path / "results.json")),
    ]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "ease.hf.lm_eval", *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "choose" in done.stdout
    assert "compute (exits (1, 2) at (0.3, 0.3)):" in done.stdout
    results = json.loads(next(tmp_path.glob("results*.json")).read_text())
    assert results["results"].keys() == {"choose", "write"}
    compute = results["config"]["compute"]
    assert 1 / 3 <= compute["layers_run"] < 1
    assert compute["flops_per_token"] > 0
