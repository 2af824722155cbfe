"""lm-evaluation-harness: scores equal those of stock transformers, batched and padded, and the compute is reported."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_chat import SPECIAL, chat_checkpoint

import ease
from ease.data.tokenizers import load_tokenizer, train_tokenizer
from ease.errors import EaseError
from ease.flops import exit_flops, full_depth_flops, layer_flops, run_flops
from ease.models import DeepSupervisionTransformer
from ease.policy import Policy
from ease.routing.forward import route
from ease.runs.store import load_model

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # imports of the harness warn
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from ease.hf.lm_eval import EaseLM, main
    from ease.hf.model import EaseForCausalLM

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


def same(ours: Any, theirs: Any) -> bool:
    """Whether two models of the harness give the same log-likelihoods, and whether they are greedy."""
    a, b = (lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True) for lm in (ours, theirs))
    return [x[0] for x in a] == pytest.approx([x[0] for x in b], rel=1e-4) and [x[1] for x in a] == [x[1] for x in b]


def adapter(model: Any, folder: Path, **options: Any) -> str:
    """Saves a random adapter of a model."""
    peft = pytest.importorskip("peft")
    options = {"target_modules": "all-linear", "init_lora_weights": False, "lora_alpha": 64} | options
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("options", "rows"),
    [({}, 0), ({}, 3), ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["norm"]}, 0)],
)
def test_an_adapter_of_the_stock_model_changes_scores_as_in_the_harness(
    folder: Path, tmp_path: Path, options: dict[str, Any], rows: int
) -> None:
    stock = AutoModelForCausalLM.from_pretrained(folder)
    if rows:  # the harness fits the vocabulary to the tokenizer before it applies an adapter
        folder = shutil.copytree(folder, tmp_path / "larger")
        stock.resize_token_embeddings(stock.config.vocab_size + rows)
        stock.save_pretrained(folder)
        shutil.rmtree(folder / "ease")
        stock = AutoModelForCausalLM.from_pretrained(folder)
    path = adapter(stock, tmp_path / "adapter", **options)
    base, ours = EaseLM(str(folder)), EaseLM(str(folder), peft=path)
    assert same(ours, HFLM(str(folder), device="cpu", peft=path))
    assert not same(ours, base)
    assert ours.model.model.trained_exits == base.model.model.trained_exits


def test_an_adapter_of_the_native_model_works_at_every_exit(folder: Path, tmp_path: Path) -> None:
    model = ease.from_pretrained(folder)
    tuned = EaseForCausalLM.wrap(ease.from_pretrained(folder))
    path = adapter(tuned, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    lm = EaseLM(str(folder), 0.5, "1+2", peft=path)
    ids = torch.arange(20)[None] + 40
    for exit in (1, 2, 3):
        ours, with_adapter = (m.logits(m.forward_to_layer(ids, exit), exit) for m in (lm.model.model, tuned.model))
        torch.testing.assert_close(ours, with_adapter, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours, model.logits(model.forward_to_layer(ids, exit), exit))
    assert lm.model.policy.exits == (1, 2)


def test_adapters_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    shape = AutoModelForCausalLM.from_pretrained(folder).config
    deeper = adapter(
        AutoModelForCausalLM.from_config(shape.__class__(**shape.to_dict() | {"num_hidden_layers": 4})),
        tmp_path / "deeper",
    )
    wider = adapter(
        AutoModelForCausalLM.from_config(shape.__class__(**shape.to_dict() | {"intermediate_size": 40})),
        tmp_path / "wider",
    )
    prompt = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )
    prompt.save_pretrained(tmp_path / "prompt")
    for path, message in (
        ("/no/such", "the adapter /no/such cannot be read"),
        (str(folder), "cannot be read"),
        (deeper, r"does not fit the model \(.*layers.3"),
        (wider, "does not fit the model .*size mismatch"),
        (str(tmp_path / "prompt"), "PROMPT_TUNING, which has no weights to merge"),
    ):
        with pytest.raises(EaseError, match=message):
            EaseLM(str(folder), peft=path)


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 20},
        {"add_bos_token": True},
        {"prefix_token_id": 7},
        {"batch_size": "auto", "max_batch_size": 3},
        {"batch_size": "auto:2"},
        {"use_fast_tokenizer": True, "truncation": True, "trust_remote_code": True, "logits_cache": False},
        {"revision": "main", "dtype": "float64", "softmax_dtype": "float64", "subfolder": ""},
        {"dtype": "bfloat16", "softmax_dtype": "float32"},
        {"backend": "causal", "softmax_dtype": "float32", "parallelize": False, "peft": None, "delta": None},
    ],
)
def test_options_of_the_harness_have_the_effect_that_they_have_there(folder: Path, options: dict[str, Any]) -> None:
    ours, theirs = EaseLM(str(folder), **options), HFLM(str(folder), device="cpu", **options)
    if options.get("dtype") != "bfloat16":
        assert same(ours, theirs)
    else:  # matrix products of other shapes round differently
        a, b = (lm.loglikelihood(instances("loglikelihood", PAIRS), True) for lm in (ours, theirs))
        assert [x[0] for x in a] == pytest.approx([x[0] for x in b], rel=0.05)
    assert ours.max_length == theirs.max_length
    assert ours.prefix_token_id == theirs.prefix_token_id


def test_a_checkpoint_with_bos_and_chat_tokens_is_scored_as_in_the_harness(tmp_path: Path) -> None:
    chat = chat_checkpoint(tmp_path / "chat")
    ours, theirs = EaseLM(str(chat), batch_size=2), HFLM(str(chat), device="cpu", batch_size=2)
    prompt = ours.apply_chat_template([{"role": "user", "content": "hi <|pad|>"}])
    assert prompt == theirs.apply_chat_template([{"role": "user", "content": "hi <|pad|>"}])
    assert ours.tok_encode(prompt) == theirs.tok_encode(prompt)
    texts = [*SPECIAL, "def wrap(self)"]
    pairs = [*PAIRS, *((prompt, text) for text in texts)]
    for kind, arguments in (("loglikelihood", pairs), ("loglikelihood_rolling", [(text,) for text in texts])):
        own, stock = (torch.tensor(getattr(lm, kind)(instances(kind, arguments), True)) for lm in (ours, theirs))
        assert torch.allclose(own, stock, rtol=1e-4), kind
    requests = [(text, {"until": ["\n\n"], "max_gen_toks": 8}) for text in (prompt, "def", "<|bos|>def")]
    own, stock = (lm.generate_until(instances("generate_until", requests), True) for lm in (ours, theirs))
    assert own == stock


def test_a_tokenizer_without_bos_and_eos_is_refused(folder: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    with pytest.raises(EaseError, match=r"names neither a bos nor an eos token.*give prefix_token_id"):
        EaseLM(str(bare))
    assert EaseLM(str(bare), prefix_token_id=1).tok_encode("a") == EaseLM(str(folder)).tok_encode("a")


def test_mixed_precision_and_another_tokenizer_have_their_effect(folder: Path, tmp_path: Path) -> None:
    (score, _), *_ = EaseLM(str(folder)).loglikelihood(instances("loglikelihood", PAIRS), True)
    (mixed, _), *_ = EaseLM(str(folder), mixed_precision_dtype="bfloat16").loglikelihood(
        instances("loglikelihood", PAIRS), True
    )
    assert mixed != score
    assert mixed == pytest.approx(score, rel=0.05)
    other = shutil.copytree(folder, tmp_path / "other")
    (folder_tokenizer := json.loads((other / "tokenizer.json").read_text()))["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(folder_tokenizer))
    ours, theirs = (EaseLM(str(folder), tokenizer=str(other)), HFLM(str(folder), device="cpu", tokenizer=str(other)))
    assert ours.tok_encode("ABC") == theirs.tok_encode("ABC") == EaseLM(str(folder)).tok_encode("abc")
    assert same(ours, theirs)
    assert same(EaseLM(str(folder), tokenizer=ours.tokenizer), theirs)


def test_a_model_in_memory_and_the_folder_of_a_run_are_scored(folder: Path, made: Path) -> None:
    lm = EaseLM(str(folder))
    again = EaseLM(lm.model, tokenizer=str(folder))
    assert same(again, lm)
    with pytest.raises(EaseError, match="dtype, peft is for a folder or a name"):
        EaseLM(lm.model, tokenizer=str(folder), dtype="float32", peft="x")
    with pytest.raises(EaseError, match="no tokenizer: give tokenizer"):
        EaseLM(lm.model)

    lm, (model, _) = EaseLM(str(made), batch_size=2), load_model(made)
    text = "def wrap(self"
    ids = load_tokenizer(made / "tokenizer.json", model.config.vocab_size).encode(text).ids
    [(total, _)] = lm.loglikelihood(instances("loglikelihood", [("def", text[3:])]), True)
    scores = ease.score(model, [(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))], model.policy)
    start = len(lm.tok_encode("def")) - 1
    assert total == pytest.approx(-scores.losses[start:].sum().item(), rel=1e-4)
    assert lm.model.policy == model.policy
    answer, *_ = lm.generate_until(instances("generate_until", [("def", {"until": ["\n"], "max_gen_toks": 4})]), True)
    assert isinstance(answer, str)


def test_options_of_the_harness_that_cannot_be_followed_are_refused_by_name(folder: Path) -> None:
    ours = {"softmax_dtype": "float16", "backend": "seq2seq", "max_length": 0, "max_batch_size": "a", "truncation": 3}
    ours |= {"batch_size": "x", "mixed_precision_dtype": "f99", "tokenizer": "/no/such", "enable_thinking": True}
    ours |= {"revision": "nope", "subfolder": "nope", "logits_cache": True, "use_fast_tokenizer": "x"}
    theirs = {
        "parallelize": True,
        "delta": "x",
        "autogptq": "x",
        "gptqmodel": True,
        "gguf_file": "x",
        "tp_plan": "auto",
    }
    theirs |= {"max_memory_per_gpu": 1, "max_cpu_memory": 1, "offload_folder": "x", "load_in_4bit": True}
    theirs |= {"misspelt": 1, "device_map": {"a": 0, "b": 1}, "attn_implementation": "eager"}
    for name, value in (ours | theirs).items():
        with pytest.raises(EaseError, match=name):
            EaseLM(str(folder), **{name: value})
    known = set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs", "pretrained", "device", "dtype"}
    followed = {
        "trust_remote_code",
        "chat_template_args",
        "think_end_token",
        "add_bos_token",
        "prefix_token_id",
        "peft",
    }
    assert known <= ours.keys() | theirs.keys() | followed, "an option of the harness that is new"
    lm = EaseLM(str(folder))
    with pytest.raises(EaseError, match="refuses a request for text"):
        lm.generate_until(instances("generate_until", [("x", {"until": ["\n"], "max_gen_toks": 500})]), True)


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
