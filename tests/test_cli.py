"""What a person types and sees: recipes, a whole run at a tiny size, and one sentence for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import ease
from ease import STRATEGIES, runs
from ease.checkpoint import load_model
from ease.cli import load_recipe, main, recipes

TINY = [
    *("--model.dim", "16", "--model.num-heads", "2", "--data.tokenizer", "byte", "--data.seq-len", "16"),
    *("--data.batch-size", "4", "--data.epoch-batches", "8", "--data.eval-batches", "4"),
]
FLOPS = [
    "--compare",
    "continued",
    "standard",
    "deep-supervision",
    "--strategy.phase1-max-flops",
    "6e7",
    "--strategy.phase2-max-flops",
    "6e7",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real text, small enough for tests: this Python's own json module, a few times a training corpus of nothing."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(json.decoder.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EASE_CACHE", str(out.parent / "cache"))
        assert main(["run", "demo", "--data", str(text), "--out", str(out), *TINY, *FLOPS]) == 0
    return out


RECIPES = [
    *("demo", "standard", "deep-supervision", "ashem", "staged", "tune", "layerskip"),
    *("discriminative", "early-exit", "open-growth", "stacking"),
]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_run_configuration_and_says_what_it_is(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.__doc__
    config = recipe.config()
    assert isinstance(config, runs.RunConfig)
    assert config == recipe.config(), "a recipe is a value"
    assert type(config.strategy) in STRATEGIES.values()
    assert config.strategy.strategy() is not None


def test_every_shipped_recipe_is_tested() -> None:
    assert set(recipes()) == set(RECIPES)


def test_a_run_is_a_folder_without_pickles(made: Path) -> None:
    names = {path.name for path in made.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "summary.json", "model.safetensors", "tokenizer.json"),
        *("explorer.json", "report.html"),
    }
    assert [p for p in made.parent.iterdir() if p.name.startswith(".")] == []


def test_the_summary_has_the_lines_of_a_fair_comparison(made: Path) -> None:
    summary = json.loads((made / "summary.json").read_text())
    lines = {line["name"]: line for line in summary["lines"]}
    assert list(lines) == [
        "phase 1",
        "phase 2",
        "phase 1 continued",
        "standard, 3 layers",
        "deep-supervision, 3 layers",
    ]
    for name in list(lines)[2:]:
        # A budget ends on a whole step and its validation pass: at this size, a few hundredths of it.
        assert lines[name]["train_flops"] == pytest.approx(lines["phase 2"]["train_flops"], rel=0.1), name
    for line in lines.values():
        assert {"ppl", "acc", "hard_ppl", "compute_cost", "flops_per_token", "seconds"} <= set(line["test"])
        assert line["train_flops"] == pytest.approx(sum(line["flops_by"].values()))
    assert lines["phase 2"]["curve"][0] == lines["phase 1"]["curve"][0]
    assert summary["hard"]["train_ratio"] == pytest.approx(0.5, abs=0.01)
    assert summary["hard"]["fixed_by"] == "phase 1's final model"
    joint = lines["deep-supervision, 3 layers"]
    assert joint["val"]["shallow_ratio"] == pytest.approx(lines["phase 2"]["val"]["shallow_ratio"], abs=0.02)


def test_the_sweep_goes_from_everyone_leaving_to_no_one(made: Path) -> None:
    points = json.loads((made / "summary.json").read_text())["sweep"]["points"]
    costs = [point["compute_cost"] for point in points]
    assert costs[0] == pytest.approx(1 / 3)
    assert costs[-1] == pytest.approx(1.0, abs=0.02)
    assert costs == sorted(costs)


def test_metrics_are_a_line_per_epoch(made: Path) -> None:
    rows = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert {"phase 1", "phase 2", "phase 1 continued"} <= {row["line"] for row in rows}
    assert all(row["val_loss"] > 0 for row in rows)


def test_eval_scores_the_test_split_at_thresholds(made: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("EASE_CACHE", str(made.parent / "cache"))
    own = runs.evaluate(made, [])[0]
    summary = json.loads((made / "summary.json").read_text())
    phase2 = next(line for line in summary["lines"] if line["name"] == "phase 2")
    assert own["ppl"] == phase2["test"]["ppl"], "what eval says is what the report says"
    assert main(["eval", str(made), "--threshold", "0.2", "0.9"]) == 0
    printed = capsys.readouterr().out
    assert "0.2" in printed
    assert "test split" in printed


def test_report_of_several_runs(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.html"
    assert main(["report", str(made), str(made), "--out", str(out)]) == 0
    assert out.stat().st_size > 10_000


def test_export_writes_what_transformers_loads_and_ease_reads_back(made: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    assert main(["export", str(made), str(out)]) == 0
    assert main(["export", str(made), str(out)]) == 2
    assert main(["export", str(made), str(out), "--overwrite"]) == 0
    model, back = load_model(made)[0], ease.from_pretrained(out)
    assert back.config == replace(model.config, max_positions=16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))
    stock = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokens = transformers.AutoTokenizer.from_pretrained(out)("import json", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(stock(**tokens).logits, model(tokens["input_ids"]), rtol=1e-4, atol=1e-4)
    assert (stock.config.max_position_embeddings, stock.config.eos_token_id) == (16, 1)
    (out / "chat_template.jinja").write_text("{{ messages }}")
    assert main(["export", str(made), str(tmp_path / "chat"), "--tokenizer", str(out)]) == 0
    assert (tmp_path / "chat" / "chat_template.jinja").is_file()


SHORT = ["--data.seq-len", "16", "--data.batch-size", "4", "--data.epoch-batches", "8", "--data.eval-batches", "4"]


def test_tune_gives_exits_to_a_checkpoint_and_leaves_its_backbone(
    made: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "tuned"
    assert main(["export", str(made), str(checkpoint)]) == 0
    data = ["--data", str(text), "--out", str(out), *SHORT]
    options = ["--exits=1,2", "--adapter", "mlp", "--objective", "both", "--tokens", "kept", "--max-epochs", "1"]
    assert main(["tune", str(checkpoint), *options, *data]) == 0
    assert "Routing" in capsys.readouterr().out
    tuned, config = load_model(out)
    assert (config["policy"]["exits"], config["policy"]["thresholds"]) == ([1, 2], [0.9, 0.9])
    assert (tuned.config.adapter_exits, tuned.trained_exits) == ((1, 2), {1, 2, 3})
    came = ease.from_pretrained(checkpoint)
    changed = {n for n, p in came.named_parameters() if not torch.equal(p, tuned.get_parameter(n))}
    assert changed == {"exit_norms.0.weight", "exit_norms.1.weight"}
    summary = json.loads((out / "summary.json").read_text())
    lines = {line["name"]: line for line in summary["lines"]}
    assert set(lines) == {"as it came", "exit tuning", "exit tuning, no routing"}
    assert lines["as it came"]["test"]["ppl"] == lines["exit tuning, no routing"]["test"]["ppl"]
    assert lines["exit tuning"]["flops_by"]["selecting"] > 0
    assert str(tmp_path) not in (out / "summary.json").read_text()
    # The run is one like any other: it is scored again, tuned again, and handed back.
    assert main(["eval", str(out), "--threshold", "0.5"]) == 0
    assert main(["tune", str(out), "--exits=2", *data, "--overwrite", "--max-epochs", "1"]) == 2, "not over itself"
    again = [*data[:2], "--out", str(tmp_path / "again"), *SHORT]
    assert main(["tune", str(out), "--exits=2", *again, "--max-epochs", "1"]) == 0
    assert main(["export", str(tmp_path / "again"), str(tmp_path / "back")]) == 0
    assert ease.from_pretrained(tmp_path / "back").exit_layer == [2]


@pytest.mark.parametrize("mode", ["full", "routed", "exact"])
def test_generate_streams_a_text(mode: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", str(made), "--prompt", "import ", "--max-new-tokens", "9", "--mode", mode, "--threshold", "0.1"]
    assert main(args) == 0
    shown = capsys.readouterr()
    model, tokenizer = load_model(made)[0], Tokenizer.from_file(str(made / "tokenizer.json"))
    model.exit_layer, model.routing_threshold = 1, 0.1
    ids = torch.tensor([tokenizer.encode("import ").ids])
    answer = ease.generate(model, ids, 9, mode, stop=tokenizer.token_to_id("<eos>"))  # type: ignore[arg-type]
    assert shown.out == "import " + tokenizer.decode(answer.tokens[0].tolist()) + "\n"
    assert f"{answer.tokens.numel()} tokens" in shown.err
    assert "layer " in shown.err


def test_ashem_grows_on_a_checkpoint(made: Path, text: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    out, plan = tmp_path / "grown", ["--strategy.pretrained", "--strategy.phase1-layers", "3"]
    limits = [
        "--strategy.phase2-layers",
        "4",
        "--strategy.phase2-max-flops",
        "6e7",
        "--compare",
        "continued",
        "standard",
    ]
    args = ["run", "ashem", "--start", str(made), "--data", str(text), "--out", str(out), *SHORT, *plan, *limits]
    assert main(args) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert [line["name"] for line in summary["lines"]] == [
        *("as it came", "phase 2", "as it came continued", "standard, 4 layers")
    ]
    assert summary["hard"]["fixed_by"] == "as it came's final model"
    came, grown = load_model(made)[0], load_model(out)[0]
    assert grown.num_layers == 4
    assert all(torch.equal(p, grown.get_parameter(n)) for n, p in came.named_parameters())


def test_a_first_phase_from_a_checkpoint_fixes_the_hard_set_itself(made, text, tmp_path: Path, monkeypatch) -> None:
    """The hard set and "continued" belong to the model that phase 2 grew from, and not to the one that came."""
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    out, plan = tmp_path / "grown", ["--strategy.phase1-layers", "3", "--strategy.phase1-max-flops", "6e7"]
    limits = ["--strategy.phase2-layers", "4", "--strategy.phase2-max-flops", "6e7", "--compare", "continued"]
    args = ["run", "ashem", "--start", str(made), "--data", str(text), "--out", str(out), *SHORT, *plan, *limits]
    assert main(args) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert [line["name"] for line in summary["lines"]] == ["as it came", "phase 1", "phase 2", "phase 1 continued"]
    assert summary["hard"]["fixed_by"] == "phase 1's final model"
    assert 0.3 < summary["hard"]["test_ratio"] < 0.7


def test_a_run_has_the_policy_that_its_strategy_ends_with(text, tmp_path: Path, monkeypatch) -> None:
    """Open growth finds its threshold when all is trained, and it sends on the share asked for."""
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    plan = ["--strategy.hard-ratio", "0.3", "--strategy.max-flops", "6e7", "--compare", "continued"]
    assert main(["run", "open-growth", "--data", str(text), "--out", str(tmp_path / "run"), *TINY, *plan]) == 0
    lines = json.loads((tmp_path / "run" / "summary.json").read_text())["lines"]
    assert [line["name"] for line in lines] == ["phase 1", "phase 2", "phase 1 continued"]
    assert lines[1]["val"]["exit_shares"]["4"] == pytest.approx(0.3, abs=0.01)
    assert load_model(tmp_path / "run")[1]["policy"]["thresholds"] == lines[1]["policy"]["thresholds"]


def test_a_plain_line_stands_beside_one_that_differs_in_its_rates(text, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    for name, lines in (("discriminative", {"discriminative", "standard, 4 layers"}), ("standard", {"training"})):
        args = ["run", name, "--data", str(text), "--out", str(tmp_path / name), *TINY, "--compare", "standard"]
        assert main([*args, "--strategy.max-flops", "3e7"]) == 0
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert {line["name"] for line in summary["lines"]} == lines


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "ease run RECIPE" in capsys.readouterr().out
    assert main(["run"]) == 0
    assert "demo" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["run", "staged", "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "Hard tokens as a share of all training tokens" in printed
    assert "--overwrite" in printed


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["walk"], "unknown command"),
        (["run", "nothing"], "no recipe"),
        (["run", "demo", "--data", "no/such/folder"], "no data"),
        (["run", "demo", "--data.tokenizer", "chars"], "unknown tokenizer"),
        (["eval", "no/such/run"], "no run folder"),
        (["report", "no/such/run"], "no/such/run"),
        (["report"], "no run given"),
        (["export", "no/such/run", "out"], "no run folder"),
        (["tune", "--exits", "1"], "name the checkpoint first"),
        (["generate", "no/such/model", "--prompt", "x"], "no folder no/such/model"),
        (["tune", "no/such/model", "--out", "new"], "no folder no/such/model"),
        (["run", "tune", "--out", "new"], "name a checkpoint with --start"),
        (["run", "ashem", "--strategy.pretrained", "--out", "new"], "name its model with --start"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(args, says, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.startswith("ease: ")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [] or [p.name for p in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (["--strategy.phase2-layers", "1"], "phase2_layers (1) must be more than phase1_layers (1)"),
        (["--strategy.hard-example-ratio", "0"], "must lie in (0, 1]"),
        (["--strategy.phase1-lr", "fast"], "phase1-lr"),
        (["--no-such-option", "1"], "no-such-option"),
    ],
)
def test_a_bad_override_is_told_by_name(override: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", "demo", *override])
    assert caught.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_too_short_a_text_is_told_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.txt"
    short.write_text("one line\n" * 30)
    assert main(["run", "demo", "--data", str(short), "--out", str(tmp_path / "out"), *TINY]) == 2
    assert "use more text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_in_a_process_of_its_own_prints_plain_text(text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ease.cli", "run", "demo", "--data", str(text), "--out", str(tmp_path / "r")]
    done = subprocess.run(
        [*command, *TINY, *FLOPS[4:], "--compare", "continued"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "phase 1 continued" in done.stdout
    assert "epoch" in done.stderr
