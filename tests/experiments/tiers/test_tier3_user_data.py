"""Tier 3 on tiny stand-ins: tables for every kind of data, one copy of a checkpoint, keys without local paths."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ease
from ease.cli.main import main
from ease.data.tokenizers import train_tokenizer
from ease.evaluation.tasks import classification_metrics
from experiments.analysis.pages import write as write_pages
from experiments.harness import running
from experiments.harness.line import BASE, PART
from experiments.harness.scheduler import Scheduler
from experiments.tiers import tier3_user_data as tier3

pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

# User data


def write(folder: Path, records: list[dict[str, str]]) -> None:
    folder.mkdir()
    parts = {"valid": records[::6], "test": records[1::6], "train": [r for i, r in enumerate(records) if i % 6 > 1]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A folder with labelled texts, prompts with completions, documents, a text, and a checkpoint of three layers."""
    folder = tmp_path_factory.mktemp("user_data")
    labels = {"kind": "good", "wise": "good", "mean": "bad", "rude": "bad"}
    texts = product(("Ada", "Bob", "Cem", "Dan", "Eve"), ("is", "was", "seems"), labels)
    write(folder / "people", [{"text": f"{a} {b} {c} today", "label": labels[c]} for a, b, c in texts])
    places = {"Chad": "N'Djamena", "Cuba": "Havana", "Iran": "Tehran", "Peru": "Lima"}
    asks = ("the capital of", "name the capital of", "which city rules", "where is the court of", "who knows")
    cities = [{"prompt": f"{ask} {a} ?", "completion": b} for ask in asks for a, b in places.items()]
    write(folder / "cities", cities)
    documents = [{"text": f"Document {i} says " + "that and this and " * (i % 9)} for i in range(120)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    shutil.copy(text_file, folder / "text.txt")
    tokenizer = train_tokenizer("bpe:300", [text_file.read_text()])
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        eos_token_id=tokenizer.token_to_id("<eos>"),
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(shape).save_pretrained(folder / "checkpoint")
    tokenizer.save(str(folder / "checkpoint" / "tokenizer.json"))
    return folder


KINDS: dict[str, tuple[str, str | None]] = {
    "labels": ("people", None),
    "completions": ("cities", None),
    "documents": ("corpus.jsonl", None),
    "text on a checkpoint": ("text.txt", "checkpoint"),
    "completions on a checkpoint": ("cities", "checkpoint"),
    "documents on a checkpoint": ("corpus.jsonl", "checkpoint"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def place(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder; no line has a process of its own, which would take longer to start than to train."""
    monkeypatch.chdir(here)
    monkeypatch.setenv("EASE_CACHE", str(here / "cache"))
    monkeypatch.setattr(running, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    return here


def arguments(kind: str) -> list[str]:
    data, model = KINDS[kind]
    return [*(["--model", model] if model else []), "--data", data]


def reproduce(kind: str) -> int:
    return main(["reproduce", "3", *arguments(kind), "--scales", "tiny", "--seeds", "0", "--out", "out"])


def folder_of(kind: str) -> Path:
    """The folder of its rows and tables."""
    return Path("out", "3", "-".join([*arguments(kind)[1::2], "tiny"]))


def data_of(kind: str) -> dict[str, Any]:
    """The content of its `test.json`, measured once for all tests."""
    if not (folder_of(kind) / "test.json").exists():
        assert reproduce(kind) == 0
    return json.loads((folder_of(kind) / "test.json").read_text())


def lab_of(kind: str, **settings: Any) -> Any:
    return replace(tier3.make_lab("tiny", *KINDS[kind], "cpu"), **settings)


# End to end


@every_kind
@pytest.mark.usefixtures("place")
def test_every_kind_of_data_ends_with_its_tables(kind: str) -> None:
    data = data_of(kind)
    folder = folder_of(kind)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "failed" in row]
    assert data["missing"] == []
    entries = {entry["line"]: entry for entry in data["entries"]}
    for name, entry in entries.items():
        spent = {BASE: PART, tier3.UNCHANGED: 0.0}.get(name, 1.0) * data["lab"]["budget"]
        assert entry["flops"] == pytest.approx(spent, rel=0.3), name
    page = (folder / "front.md").read_text()
    assert "what exits save" in page
    assert f"ease reproduce 3 {' '.join(arguments(kind))} --seeds 0 --scales tiny" in page
    shown = {"labels": "test accuracy | test macro F1", "completions": "test accuracy | test ROUGE-L"}
    for measured, header in shown.items():
        assert (header in page) == kind.startswith(measured)
    assert all((folder / f"front.{suffix}").stat().st_size > 500 for suffix in ("tex", "svg", "pdf"))


@pytest.mark.usefixtures("place")
def test_a_second_run_trains_nothing_and_scores_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("labels", "text on a checkpoint"):
        data_of(kind)
        before = {path: path.read_bytes() for path in folder_of(kind).rglob("*.*") if path.suffix != ".pdf"}
        capsys.readouterr()
        assert reproduce(kind) == 0
        said = capsys.readouterr().out
        assert "seed 0" not in said, "no line, and no test split"
        assert {path: path.read_bytes() for path in before} == before


@pytest.mark.usefixtures("place")
def test_a_spent_time_budget_lists_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "3", *arguments("labels"), "--scales", "tiny", "--budget", "1e-9", "--out", "later"]) == 0
    missing = capsys.readouterr().out.split("resumes: ")[1].strip().split("; ")
    assert missing == [f"people-tiny: {name}" for name in tier3.new_lines(tier3.SIZES["tiny"], "labels")]
    assert not list(Path("later").rglob("rows.jsonl"))


def test_workers_train_it_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setenv("EASE_CACHE", str(here / "cache"))
    made = tier3.experiment("tiny", "people", None, "cpu", (0,))
    few = made._replace(lines={name: made.lines[name] for name in (BASE, "standard, 1 layer")})
    done = running.run([few], running.Settings(here / "workers", (0,), log=lambda _: None), write_pages)
    assert done.missing == []
    assert {entry["line"] for entry in done.data[0]["entries"]} == set(few.lines)


# Figures


@pytest.mark.usefixtures("place")
def test_accuracy_and_f1_are_those_of_the_stored_model() -> None:
    data = data_of("labels")
    lab = lab_of("labels")
    scheduler = Scheduler(lambda: lab, {}, folder_of("labels"))
    (entry,) = [entry for entry in data["entries"] if entry["line"] == "early exit"]
    model = scheduler.model(scheduler.rows()[entry["key"]])
    for point in entry["points"]:
        policy = ease.Policy(tuple(point["exits"]), tuple(point["thresholds"]))
        found = classification_metrics(model, lab.test, policy)
        assert [point["test"][name] for name in ("acc", "f1")] == pytest.approx([found["acc"], found["f1"]])


@pytest.mark.usefixtures("place")
def test_rouge_is_measured_on_text_generated_under_the_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = lab_of("completions", written=3)
    seen = []

    def figures(model: Any, task: Any, examples: Any, *_: Any, mode: str, max_new_tokens: int) -> dict[str, float]:
        seen.append((model.policy, mode, len(examples), max_new_tokens))
        return {"rouge_l": 0.5}

    monkeypatch.setattr("experiments.harness.task_labs.completion_metrics", figures)
    policies = [ease.Policy((1,), (0.3,), "classifier"), ease.Policy()]
    model = lab.model(2)
    scores = ease.score(model, lab.test)
    assert [lab.extra_metrics(model, policy, scores) for policy in policies] == [{"rouge_l": 0.5}] * 2
    longest = max(int((example.targets >= 0).sum()) for example in lab.text["test"][:3])
    assert seen == [(policy, "routed", 3, longest) for policy in policies]


# A checkpoint


@pytest.mark.parametrize("tied", [True, False])
def test_models_share_a_checkpoint_and_store_their_exits_only(place: Path, tmp_path: Path, tied: bool) -> None:
    if tied:
        lab = lab_of("text on a checkpoint")
    else:
        torch.manual_seed(0)
        ease.save_pretrained(ease.StandardTransformer(300, 32, 3, hidden_dim=64), tmp_path / "untied")
        lab = replace(lab_of("text on a checkpoint"), path=str(tmp_path / "untied"))
    before = {name: value.clone() for name, value in lab.backbone.state_dict().items()}
    scheduler = Scheduler(lambda: lab, tier3.checkpoint_lines(3), tmp_path / "lines")
    while todo := scheduler.status([0]).todo:
        scheduler.store(scheduler.train(todo[0]))
    rows = {row["line"]: row for row in scheduler.rows().values()}
    assert all(torch.equal(value, before[name]) for name, value in lab.backbone.state_dict().items())
    for name, row in rows.items():
        model = scheduler.model(row)
        kept = load_file(scheduler.weights(row["key"]))
        assert all(part.startswith("exit_") for part in kept), "the checkpoint is not written again"
        assert all(torch.equal(model.state_dict()[part], value) for part, value in kept.items())
        for part, value in model.named_parameters():
            shared = part in before and value.data_ptr() == lab.backbone.get_parameter(part).data_ptr()
            assert shared != part.startswith("exit_"), part
        assert (model.output_head.weight is model.embedding.weight) == tied
        full = next(point for point in row["sweep"] if not point["exits"])["val"]
        assert ease.score(model, lab.val).metrics()["loss"] == pytest.approx(full["loss"]), name
    untouched = ease.score(ease.from_pretrained(lab.path), lab.val).metrics()["loss"]
    full = {name: next(p for p in row["sweep"] if not p["exits"])["val"]["loss"] for name, row in rows.items()}
    whole = {name: loss for name, loss in full.items() if not name.startswith("truncated")}
    assert whole == pytest.approx(dict.fromkeys(whole, untouched)), "exits change nothing at full depth"
    assert rows["exits"]["exits"] == rows["exits, distilled, classifier exit"]["exits"] == [1, 2]
    assert rows["checkpoint"]["flops"] == 0


@pytest.mark.usefixtures("place")
def test_a_truncated_checkpoint_has_its_first_layers_and_trains_its_norm_only(tmp_path: Path) -> None:
    lab = lab_of("text on a checkpoint")
    ids = next(iter(lab.val))[0].long()
    truncated, whole = lab.model(2), lab.model(None)
    assert torch.equal(truncated(ids), whole.logits(whole.forward_to_layer(ids, 2), 2))
    before = {name: value.clone() for name, value in truncated.state_dict().items()}  # its layers are shared
    scheduler = Scheduler(lambda: lab, tier3.checkpoint_lines(3), tmp_path)
    row = scheduler.train(next(task for task in scheduler.status([0]).todo if task.line == "truncated after layer 2"))
    trained = scheduler.model(row).state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, trained[name])}
    assert moved == {"exit_norms.1.weight"}
    assert row["val"]["loss"] < ease.score(truncated, lab.val).metrics()["loss"]


def test_weights_are_read_only_when_a_model_is_made(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ease.hf, "from_pretrained", lambda *_, **__: pytest.fail("the weights were read"))
    lab = lab_of("text on a checkpoint")
    assert lab.describe()["depth"] == 3
    assert max(lab.shares) == 0.95, "where exits may cost nothing"
    assert lab.identity()["hash"]


# What decides a row


@every_kind
def test_a_key_depends_on_the_data_and_not_on_its_path(kind: str, place: Path, tmp_path: Path) -> None:
    def lab_in(folder: Path) -> Any:
        data, model = KINDS[kind]
        return tier3.make_lab("tiny", str(folder / data), model and str(folder / model), "cpu")

    before, other = lab_in(place), tmp_path / "elsewhere"
    shutil.copytree(place, other, ignore=shutil.ignore_patterns("out", "later", "workers", "cache"))
    moved = lab_in(other)
    assert moved.identity() == before.identity()
    assert str(tmp_path) not in json.dumps(moved.describe())
    if "checkpoint" in kind:
        assert replace(moved, device="meta").identity() == before.identity()
        weights = load_file(other / "checkpoint" / "model.safetensors")
        weights["model.norm.weight"][0] += 1
        save_file(weights, other / "checkpoint" / "model.safetensors", {"format": "pt"})
        assert lab_in(other).identity() != before.identity()
        shutil.copytree(place / "checkpoint", other / "checkpoint", dirs_exist_ok=True)
    for name, was, now in (
        ("people/train.jsonl", "wise", "rash"),
        ("people/valid.jsonl", "wise", "rash"),
        ("people/test.jsonl", "wise", "rash"),
        ("cities/train.jsonl", "Lima", "Cuzco"),
        ("corpus.jsonl", "Document 1 ", "Page 1 "),
        ("text.txt", "License", "Licence"),
    ):
        (other / name).write_text((other / name).read_text().replace(was, now))
    assert lab_in(other).identity() != before.identity()


@pytest.mark.parametrize("kind", ["labels", "completions", "text on a checkpoint", "completions on a checkpoint"])
def test_records_and_texts_that_overlap_are_accepted_on_request(kind: str, place: Path, tmp_path: Path) -> None:
    data, model = KINDS[kind]
    folder = tmp_path / "overlapping"
    folder.mkdir()
    records = (place / data).is_dir()
    source = place / data / "train.jsonl" if records else place / data
    for split in ("train", "valid", "test"):
        shutil.copy(source, folder / f"{split}{source.suffix}")
    where = "tiny", str(folder), model and str(place / model), "cpu"
    with pytest.raises(ease.EaseError, match="allow_overlap"):
        tier3.make_lab(*where)
    assert len(tier3.make_lab(*where, allow_overlap=True).text["test"]) > 0


@pytest.mark.usefixtures("place")
def test_a_stream_continues_after_the_epochs_that_were_read() -> None:
    lab = lab_of("documents", epoch_batches=2)
    whole, later = lab.train(0), lab.train(0)
    epochs = [[batch.x for batch in whole] for _ in range(3)]
    later.epoch = 2
    assert all(torch.equal(a, b.x) for a, b in zip(epochs[2], later, strict=True))
    assert whole.epoch == later.epoch == 3
    assert not all(torch.equal(a, b.x) for a, b in zip(epochs[0], lab.train(1), strict=True)), "seeds differ in order"


@pytest.mark.usefixtures("place")
def test_a_part_of_examples_is_a_part() -> None:
    lab = lab_of("labels")
    half = lab.train(0, (0.5, 1.0))
    assert list(half.examples) == lab.text["train"][20:]


# Refused


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "no data of its own: give --data a folder with train.jsonl"),
        (["--model", "checkpoint"], "give --data"),
        (["--data", "text.txt"], "no data for tier 3 without --model"),
        (["--data", "no/such.jsonl"], "no stream of documents"),
        (["--data", "people", "--model", "checkpoint"], "leave out --model"),
        (["--data", "strange"], "begins with no record for tier 3 (fields: question)"),
        (["--data", "torn"], "begins with no record for tier 3 (fields: none)"),
        (["--data", "half"], "has no valid.jsonl"),
        (["--data", "text.txt", "--model", "no/such/checkpoint"], "there is no folder"),
        (["--data", "text.txt", "--model", "people"], "has no config.json"),
        (["--data", "people", "--scales", "huge"], "unknown scale 'huge': use tiny, s, l"),
        (["--data", "people", "--seeds", "1,1"], "each once"),
        (["--data", "people", "--device", "abacus"], "no device"),
    ],
)
def test_bad_input_is_one_sentence(
    args: list[str], says: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, line in {"strange": '{"question": 1}', "torn": '{"text', "half": '{"text": "a", "label": 1}'}.items():
        (place / name).mkdir(exist_ok=True)
        (place / name / "train.jsonl").write_text(line)
    assert main(["reproduce", "3", *args, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "package"), [("completions", "rouge_score.rouge_scorer"), ("documents", "datasets")])
def test_a_missing_package_is_named_before_anything_is_trained(
    kind: str, package: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["reproduce", "3", *arguments(kind), "--scales", "tiny", "--out", str(tmp_path / "out")]) == 2
    assert f"needs the package {package.split('.')[0]}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("place")
def test_a_checkpoint_of_one_layer_has_no_exit(tmp_path: Path, capsys: Any) -> None:
    ease.save_pretrained(ease.StandardTransformer(300, 32, 1, hidden_dim=64), tmp_path / "flat")
    assert main(["reproduce", "3", "--data", "text.txt", "--model", str(tmp_path / "flat")]) == 2
    assert "give a deeper checkpoint" in capsys.readouterr().err


def test_a_model_is_for_tier_3_alone(capsys: Any) -> None:
    assert main(["reproduce", "1", "--model", "checkpoint"]) == 2
    assert "--model is for tier 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ("hf:allenai/c4/en", "documents"),
        ("part-*.jsonl.gz", "documents"),
        ("more/*.parquet", "documents"),
        ("wikitext-2", "text"),
        ("stdlib", "text"),
    ],
)
def test_the_kind_of_data_follows_from_its_name(data: str, kind: str) -> None:
    assert tier3.kind_of(data) == kind


@pytest.mark.parametrize(("layers", "exits"), [(2, (1,)), (3, (1, 2)), (12, (4, 8)), (32, (10, 21))])
def test_exits_are_after_a_third_and_two_thirds(layers: int, exits: tuple[int, ...]) -> None:
    assert tier3.exits_of(layers) == exits
    assert all(exit < layers for exit in exits)
