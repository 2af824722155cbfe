"""JSONL files as tasks: what is read and refused, what is scored, who decides, and both tasks from file to figure."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ease import (
    Batch,
    EaseError,
    MinedBatches,
    Policy,
    StandardTransformer,
    Trainer,
    create_deep_supervision_config,
    score,
)
from ease.cli.main import main
from ease.data.tasks import Example, ExampleBatches, load_classification, load_completion, read_jsonl
from ease.data.tokenizers import EOS, load_tokenizer
from ease.evaluation.tasks import classification_figures, complete, macro_f1, predict, rouge_l
from ease.flops import run_flops
from ease.generation.decode import generate
from ease.routing.forward import routed_forward
from ease.runs.store import load_model

ROOT = Path(__file__).parents[1]
Make = Callable[..., StandardTransformer]
Write = Callable[..., Path]
A, B, C = ({"text": f"text {i}", "label": label} for i, label in enumerate(("no", "yes", "no")))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the three files of a task: `write(train=[record or line, ...])`; splits not named get a record each."""

    def make(**splits: list[Any]) -> Path:
        default: dict[str, list[Any]] = {"train": [A, B], "valid": [C], "test": [{**C, "text": "text 9"}]}
        for name, records in (default | splits).items():
            lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path

    return make


# ---------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_any_line_end_a_mark_and_empty_lines_are_read(end: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + end.join(['{"text": "a\u2028b"}', "", "  ", '{"text": "c", "more": 1}']).encode()
    )
    records = read_jsonl(path, text=(str,))
    assert [r.fields for r in records] == [("a\u2028b",), ("c",)]
    assert [r.where for r in records] == [f"{path}:1", f"{path}:4"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a"', "is no JSON"),
        ("[1, 2]", "is no JSON object"),
        ('{"text": "a"}', "has no field 'label' (only text)"),
        ('{"text": 3, "label": "no"}', "'text' must be str, got 3"),
        ('{"text": "a", "label": true}', "'label' must be str or int, got true"),
        ('{"text": "a", "label": 1.5}', "'label' must be str or int, got 1.5"),
        ('{"text": " ", "label": "no"}', "'text' is empty"),
        ('{"text": "a \\ud800", "label": "no"}', "'text' is no valid text at character 3"),
        ('{"text": "a", "label": "perhaps"}', "the label 'perhaps' is not among those the head knows ('no', 'yes')"),
    ],
)
def test_a_bad_line_is_named(line: str, said: str, write: Write) -> None:
    folder = write(valid=[C, "", line])
    with pytest.raises(EaseError, match=re.escape(f"{folder / 'valid.jsonl'}:3") + ".*" + re.escape(said)) as error:
        load_classification(folder, "byte")
    assert "\n" not in str(error.value)


def test_files_that_are_missing_empty_or_no_text_are_refused(write: Write) -> None:
    folder = write()
    (folder / "test.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(EaseError, match=r"test.jsonl as UTF-8"):
        load_classification(folder, "byte")
    (folder / "test.jsonl").write_text("\n\n")
    with pytest.raises(EaseError, match=r"test.jsonl has no record"):
        load_classification(folder, "byte")
    (folder / "test.jsonl").unlink()
    with pytest.raises(EaseError, match=r"has no test.jsonl: put train.jsonl, valid.jsonl, test.jsonl there"):
        load_classification(folder, "byte")


# ---------------------------------------------------------------------------------------------------------
# Examples


def test_a_label_is_the_target_of_the_last_token(write: Write) -> None:
    task = load_classification(write(), "byte")
    assert task.labels == ("no", "yes")
    ids = task.tokenizer.encode("text 1").ids
    assert task.train[1].ids.tolist() == [*ids, task.eos]
    assert task.train[1].targets.tolist() == [-100] * len(ids) + [1]


def test_labels_are_integers_or_strings_and_a_finished_head_keeps_its_order(write: Write) -> None:
    numbers = [{"text": str(i), "label": label} for i, label in enumerate((10, 9))]
    folder = write(train=numbers, valid=[{"text": "x", "label": 9}], test=[{"text": "y", "label": 10}])
    assert load_classification(folder, "byte").labels == (9, 10)
    task = load_classification(folder, "byte", labels=[10, 8, 9])
    assert [e.targets[-1].item() for e in (*task.train, *task.val, *task.test)] == [0, 2, 2, 0]
    for labels in ([10, "9"], [10, 10]):
        folder = write(train=[{"text": str(i), "label": label} for i, label in enumerate(labels)])
        with pytest.raises(EaseError, match="give at least two, all strings or all integers"):
            load_classification(folder, "byte")


def test_a_completion_is_scored_after_its_prompt_and_the_prompt_is_not(write: Write) -> None:
    records = [{"prompt": "ab", "completion": "cd"}, {"prompt": "xyz", "completion": "u"}]
    task = load_completion(
        write(
            train=records,
            valid=[{"prompt": "k", "completion": "l"}],
            test=[{"prompt": "m", "completion": "n"}],
        ),
        "byte",
    )
    a, b, c, d = task.tokenizer.encode("abcd").ids
    assert task.train[0].ids.tolist() == [a, b, c, d]
    assert task.train[0].targets.tolist() == [-100, c, d, task.eos]


def test_what_is_cut_or_left_out_is_said(write: Write) -> None:
    long, wide = {"prompt": "abcdef", "completion": "xy"}, {"prompt": "a", "completion": "123456"}
    short = {"prompt": "a", "completion": "b"}
    folder = write(train=[short, long, wide], valid=[{**short, "prompt": "c"}], test=[{**short, "prompt": "d"}])
    said = "of 3 records in .*train.jsonl 1 prompts lose their beginning, 1 records are left out, whose completion"
    with pytest.warns(UserWarning, match=said):
        task = load_completion(folder, "byte", seq_len=5)
    assert [task.tokenizer.decode(e.ids.tolist()) for e in task.train] == ["ab", "defxy"]
    assert [e.targets.tolist().count(-100) for e in task.train] == [0, 2]
    with pytest.raises(EaseError, match=r"no record of .*train.jsonl remains"):
        load_completion(folder, "byte", seq_len=1)

    with pytest.warns(UserWarning, match="of 2 records in .*train.jsonl 2 texts are cut to 4 tokens"):
        texts = load_classification(
            write(
                train=[{**A, "text": "abcdef"}, {**B, "text": "bcdef"}],
                valid=[{**C, "text": "c"}],
                test=[{**C, "text": "d"}],
            ),
            "byte",
            seq_len=4,
        )
    assert [texts.tokenizer.decode(e.ids.tolist()) for e in texts.train] == ["abc", "bcd"]
    assert [e.targets[-1].item() for e in texts.train] == [0, 1]


def test_what_train_holds_is_not_scored_again(write: Write) -> None:
    with pytest.warns(UserWarning, match="of 2 records in .*valid.jsonl 1 records are left out, which train"):
        task = load_classification(write(valid=[{**A, "label": "yes"}, C]), "byte")
    assert len(task.val) == 1


# ---------------------------------------------------------------------------------------------------------
# Batches


@pytest.fixture
def examples() -> list[Example]:
    """Texts of all lengths from 1 to 40, the label of each at its last token."""
    lengths = (torch.randperm(40) + 1).tolist()
    rows = [torch.randint(1, 256, (n,), dtype=torch.int32) for n in lengths]
    return [
        Example(ids, torch.full_like(ids, -100).index_fill(0, torch.tensor([len(ids) - 1]), len(ids) % 3))
        for ids in rows
    ]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("bucket", [False, True])
def test_every_example_comes_once_an_epoch_and_padding_is_none_of_it(
    shuffle: bool, bucket: bool, examples: list[Example]
) -> None:
    batches = ExampleBatches(examples, 6, shuffle=shuffle, bucket=bucket, seed=3)
    first, second = list(batches), list(batches)
    assert len(first) == len(batches) == 7
    rows = []
    for batch in first:
        assert batch.layout is not None
        real = batch.layout.real
        assert torch.equal(real, real.sum(1, keepdim=True) > torch.arange(real.shape[1]))
        assert real.any(0).all()  # as long as the longest and no longer
        assert (batch.y[~real] == -100).all()
        rows += [(x[r].tolist(), y[r].tolist()) for x, y, r in zip(batch.x, batch.y, real)]
    made = [(e.ids.tolist(), e.targets.tolist()) for e in examples]
    assert sorted(rows) == sorted(made)
    assert (rows == made) is (not shuffle and not bucket)
    assert [b.x.tolist() for b in first] != [b.x.tolist() for b in second] or not shuffle
    again = ExampleBatches(examples, 6, shuffle=shuffle, bucket=bucket, seed=3)
    again.epoch = 1
    assert all(torch.equal(a.x, b.x) for a, b in zip(second, again))
    padding = sum(int((~batch.layout.real).sum()) for batch in first if batch.layout)
    assert padding < 100 if bucket else padding > 200  # 1 + 2 + 3 + 4 + 5 a batch, where lengths are sorted


# ---------------------------------------------------------------------------------------------------------
# One decision a row


@torch.no_grad()
def test_the_last_real_token_decides_and_its_row_leaves_with_it(tiny: Make, examples: list[Example]) -> None:
    model = tiny(3, sharp=True, num_labels=3)
    assert model.output_head.weight.shape == (3, 32)
    batch = next(iter(ExampleBatches(examples, 40)))
    assert batch.layout is not None
    last = batch.layout.real.sum(1) - 1
    state, sure = model.embed(batch.x), []
    for layer in (1, 2, 3):
        state = model.run(state, layer, layer, layout=batch.layout)
        sure.append(model.logits(state, layer)[torch.arange(40), last].softmax(-1).amax(-1))
    threshold = float(sure[0].median())
    first, *_, end = routed_forward(model, batch.x, Policy((1,), (threshold,)), layout=batch.layout)
    assert torch.equal(first.asked.nonzero()[:, 1], last)
    torch.testing.assert_close(first.confidence, sure[0])
    leaves = sure[0] >= threshold
    assert 5 < int(leaves.sum()) < 35
    assert torch.equal(end.arrived, batch.layout.real & ~leaves[:, None])
    # A row that goes on goes as a whole, so it ends as at full depth.
    torch.testing.assert_close(end.confidence, sure[2][~leaves])

    scores = score(model, [batch], Policy((1,), (threshold,)))
    assert len(scores.exits) == 40
    assert scores.exits.tolist() == [1 if left else 3 for left in leaves]
    heads = 2 * 32 * 3 * (40 + int((~leaves).sum()))  # a head of 3 labels at width 32
    layers = run_flops(model.config, 1, batch.layout.real, batch.layout)
    assert scores.flops == heads + layers + run_flops(model.config, 2, end.arrived, batch.layout)


def test_hard_rows_are_mined_whole(tiny: Make, examples: list[Example]) -> None:
    model = tiny(2, sharp=True, num_labels=3)
    mined = MinedBatches(model, ExampleBatches(examples, 8), Policy(), 0.5)
    assert mined.total == 40
    assert mined.hard == pytest.approx(20, abs=1)
    rows = torch.cat([batch.running.any(1) for batch in mined])
    assert int(rows.sum()) == mined.hard
    for batch in mined:
        assert batch.layout is not None
        assert torch.equal(batch.running, batch.layout.real & batch.running.any(1, keepdim=True))


@torch.no_grad()
def test_patience_leaves_where_exits_agree(tiny: Make, examples: list[Example]) -> None:
    model = tiny(5, sharp=True, num_labels=3)
    batch = next(iter(ExampleBatches(examples, 40)))
    assert batch.layout is not None
    last, state, named = batch.layout.real.sum(1) - 1, model.embed(batch.x), []
    for layer in range(1, 6):
        state = model.run(state, layer, layer, layout=batch.layout)
        named.append(model.logits(state, layer)[torch.arange(40), last].argmax(-1).tolist())
    wanted = []
    for votes in zip(*named):
        agree = [e for e in range(3, 5) if len(set(votes[e - 3 : e])) == 1]
        wanted.append(min(agree, default=5))
    assert 0 < wanted.count(3) < 40
    assert {3, 4, 5} == set(wanted)
    likeliest, exits = predict(model, batch.x, batch.layout, Policy.patient((1, 2, 3, 4), 3))
    assert exits[torch.arange(40), last].tolist() == wanted
    assert likeliest[torch.arange(40), last].tolist() == [named[e - 1][i] for i, e in enumerate(wanted)]
    assert (likeliest[~batch.scored] == -1).all()
    with pytest.raises(EaseError, match="patience is 0"):
        Policy.patient((1,), 0)


def test_the_loss_asks_the_last_token_alone(tiny: Make, examples: list[Example]) -> None:
    model = tiny(2, num_labels=3)
    trainer = Trainer(create_deep_supervision_config(2), 3)
    batch = next(iter(ExampleBatches(examples, 40)))
    loss = trainer.compute_loss(model, batch.x, batch.y, layout=batch.layout)
    alone = []
    for example in examples:
        logits = [at[0, -1] for at in model.forward_all_layers(example.ids[None].long())]
        target = example.targets[-1].long()
        alone.append(sum(torch.nn.functional.cross_entropy(at, target) for at in logits) / 2)
    torch.testing.assert_close(loss, torch.stack(alone).mean())  # type: ignore[arg-type]
    with pytest.raises(EaseError, match=r"must lie in 0..2, got 5..5"):
        score(model, [Batch(batch.x[:1, :1], torch.tensor([[5]]))])
    with pytest.raises(EaseError, match="a head of its own"):
        tiny(2, num_labels=3, tie_embeddings=True)


# ---------------------------------------------------------------------------------------------------------
# Figures


def test_macro_f1_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    for labels in (2, 5):
        targets, predicted = torch.randint(labels, (30,)), torch.randint(1, labels + 1, (30,))
        expected = metrics.f1_score(targets, predicted, average="macro")
        assert macro_f1(predicted, targets) == pytest.approx(expected)


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    pytest.importorskip("rouge_score")
    # 3 words of 4 and 6: precision 3/4, recall 3/6, so F is 0.6.
    assert rouge_l(["the cat sat down"], ["the big cat has sat there"]) == pytest.approx(0.6)
    assert rouge_l(["a b", "c"], ["a b", "d"]) == pytest.approx(0.5)


def test_completions_are_those_of_each_prompt_alone(tiny: Make, write: Write) -> None:
    record = {"prompt": "a", "completion": "b"}
    folder = write(train=[record], valid=[{**record, "prompt": "c"}], test=[{**record, "prompt": "d"}])
    task = load_completion(folder, "byte")
    model = tiny(3, sharp=True, vocab_size=258).double()
    model.exit_layer, model.routing_threshold = (1, 2), (0.5, 0.5)
    prompts = [torch.randint(2, 258, (n,)) for n in (3, 9, 1)]
    for mode in ("full", "routed"):
        together = complete(model, task, prompts, mode=mode, max_new_tokens=6)
        alone = [complete(model, task, [prompt], mode=mode, max_new_tokens=6)[0] for prompt in prompts]
        assert together == alone
    # Validation may choose no exit at all.
    silent = tiny(3, sharp=True, vocab_size=258)
    assert complete(silent, task, prompts, mode="routed", max_new_tokens=6) == complete(
        silent, task, prompts, max_new_tokens=6
    )
    # The token that ends a text ends it and is no part of it.
    first = generate(model, prompts[0][None], 6).tokens[0].tolist()
    ended = complete(model, replace(task, eos=first[2]), prompts[:1], max_new_tokens=6)
    assert ended == [task.tokenizer.decode(first[: first.index(first[2])])]


# ---------------------------------------------------------------------------------------------------------
# From file to figure


def recipe(name: str) -> Any:
    """The module of a recipe."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / "tasks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def split(write: Write, records: list[dict[str, Any]]) -> Path:
    """Three splits of the records, of which the last two get a tenth each."""
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
    records, tenth = [records[i] for i in order], len(records) // 10
    return write(train=records[2 * tenth :], valid=records[:tenth], test=records[tenth : 2 * tenth])


def test_a_classifier_from_file_to_figure(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The word that was said last of somebody counts.
    names = [f"n{i}" for i in range(8)]
    adjectives = {"good": ("kind", "wise", "brave"), "bad": ("mean", "rude", "lazy")}
    records: list[dict[str, Any]] = []
    for label, words in adjectives.items():
        other = [w for ws in adjectives.values() for w in ws if w not in words]
        records += [{"text": f"{n} is {w} {m}", "label": label} for n in names for m in names for w in words]
        records += [
            {"text": f"{n} was {o} but now {n} is {w}", "label": label} for n in names for w in words for o in other
        ]
    folder, out = split(write, records), tmp_path / "run"
    options = {"num_layers": 3, "dim": 32, "tokenizer": "word", "lr": 3e-3, "max_epochs": 4, "device": "cpu"}
    summary = recipe("classify").main(folder, out, **options)
    test = summary["test"]
    assert test["no routing"]["acc"] > 0.95
    assert test["no routing"]["f1"] > 0.95
    assert test["confidence"]["acc"] > 0.95
    assert test["confidence"]["shallow_ratio"] > 0.5
    assert test["confidence"]["flops_per_token"] < 0.8 * test["no routing"]["flops_per_token"]
    assert set(test["patience"]["exit_shares"]) == {2, 3}
    assert json.loads((out / "summary.json").read_text())["test"]["confidence"]["acc"] == test["confidence"]["acc"]

    model, config = load_model(out)
    tokenizer = load_tokenizer(out / "tokenizer.json")
    task = load_classification(folder, tokenizer, eos=tokenizer.token_to_id(EOS), labels=config["labels"])
    again = classification_figures(
        model, ExampleBatches(task.test, 32), Policy.of(model.exit_layer, model.routing_threshold)
    )
    assert again["f1"] == test["confidence"]["f1"]
    assert again["exit_shares"] == test["confidence"]["exit_shares"]
    with pytest.raises(EaseError, match="exists already"):
        recipe("classify").main(folder, out)
    with pytest.raises(EaseError, match="seed must lie in"):
        recipe("classify").main(folder, tmp_path / "other", seed=-1, tokenizer="word")
    for command in (["generate", str(out), "--prompt", "n1"], ["export", str(out), str(tmp_path / "out")]):
        assert main(command) == 2
        assert "classif" in capsys.readouterr().err


def test_completions_from_file_to_figure(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("rouge_score")
    asks = [
        "what is the capital of",
        "name the capital of",
        "which city rules",
        "i forgot the capital of",
        "capital of",
    ]
    asks += [f"{ask} my friend" for ask in asks]
    records = [
        {"prompt": f"{ask} land{i}", "completion": f"city{i} in the north" if i % 2 else f"old town of city{i}"}
        for ask in asks
        for i in range(20)
    ]
    options = {"num_layers": 3, "dim": 32, "tokenizer": "word", "lr": 5e-3, "max_epochs": 12, "device": "cpu"}
    test = recipe("complete").main(split(write, records), tmp_path / "run", max_new_tokens=8, **options)["test"]
    assert test["full"]["rouge_l"] > 0.95
    assert test["full"]["shallow_ratio"] == 0
    assert test["routed"]["rouge_l"] > 0.95
    assert test["routed"]["shallow_ratio"] > 0.3
    assert load_model(tmp_path / "run")[0].num_layers == 3
    assert main(["generate", str(tmp_path / "run"), "--prompt", "capital of land3", "--max-new-tokens", "8"]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("name", ["classify", "complete"])
def test_a_recipe_ends_bad_input_in_one_sentence(name: str, tmp_path: Path) -> None:
    script = ROOT / "recipes" / "tasks" / f"{name}.py"
    command = [sys.executable, str(script), "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"ease: .* has no train.jsonl: put .* there\n", done.stderr)
    assert list(tmp_path.iterdir()) == []
