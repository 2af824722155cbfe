"""The command line: recipes, a whole run at a tiny size, and one sentence for bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_runs import SHORT, TINY, budget
from tokenizers import Tokenizer

import ease
from ease import STRATEGIES
from ease.cli.main import main
from ease.cli.recipes import load_recipe, recipes
from ease.policy import Policy
from ease.runs import runner as runs
from ease.runs.store import load_model

RECIPES = [
    *("demo", "standard", "deep", "deep-supervision", "ashem", "staged", "tune", "layerskip"),
    *("brick", "discriminative", "early-exit", "open-growth", "growth", "gated"),
    *("memory", "ashem-memory", "growth-memory"),
]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_run_configuration_with_a_docstring(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.__doc__
    config = recipe.config()
    assert isinstance(config, runs.RunConfig)
    assert config == recipe.config(), "a recipe is a value"
    assert type(config.strategy) in STRATEGIES.values()
    assert config.strategy.strategy() is not None


def test_every_shipped_recipe_is_tested() -> None:
    assert set(recipes()) == set(RECIPES)


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


def test_tune_gives_exits_to_a_checkpoint_and_leaves_its_backbone(
    made: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "tuned"
    assert main(["export", str(made), str(checkpoint)]) == 0
    data = ["--data", str(text_file), "--out", str(out), *SHORT]
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
    assert set(lines) == {"initial model", "exit tuning", "exit tuning, no routing"}
    assert lines["initial model"]["test"]["ppl"] == lines["exit tuning, no routing"]["test"]["ppl"]
    assert lines["exit tuning"]["flops_by"]["selecting"] > 0
    assert str(tmp_path) not in (out / "summary.json").read_text()
    # The run is one like any other: it is scored again, tuned again, and handed back.
    assert main(["eval", str(out), "--threshold", "0.5"]) == 0
    assert main(["tune", str(out), "--exits=2", *data, "--overwrite", "--max-epochs", "1"]) == 2, "not over itself"
    again = [*data[:2], "--out", str(tmp_path / "again"), *SHORT]
    assert main(["tune", str(out), "--exits=2", *again, "--max-epochs", "1"]) == 0
    assert main(["export", str(tmp_path / "again"), str(tmp_path / "back")]) == 0
    assert ease.from_pretrained(tmp_path / "back").policy.exits == (2,)


def test_tune_gives_a_draft_brick_to_a_run_and_leaves_the_rest(
    made: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "brick"
    options = ["--adapter=brick", "--max-epochs", "1", "--vocabulary", "100", "--data", str(text_file), *SHORT]
    assert main(["tune", str(made), *options, "--out", str(out)]) == 0
    assert "The draft brick predicts the full model's token at" in capsys.readouterr().out
    (came, before), (tuned, config) = load_model(made), load_model(out)
    assert all(torch.equal(value, tuned.state_dict()[name]) for name, value in came.state_dict().items())
    assert tuned.config == replace(came.config, draft_brick=True, draft_vocabulary=100)
    assert config["policy"]["exits"] == before["policy"]["exits"]
    summary = json.loads((out / "summary.json").read_text())
    assert 0 <= summary["drafts"]["agreement_3"] <= summary["drafts"]["agreement_2"] <= summary["drafts"]["agreement"]
    assert "val_agreement" in summary["lines"][-1]["curve"][-1]
    assert main(["export", str(out), str(tmp_path / "exported")]) == 0
    assert ease.from_pretrained(tmp_path / "exported").config.draft_vocabulary == 100


def test_a_table_of_the_training_text_is_made_once_and_kept(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(made, tmp_path / "run"))
    command = ["generate", str(run), "--prompt", "def f(", "--mode", "exact", "--max-new-tokens", "8"]
    assert main(command) == 0
    text = capsys.readouterr().out
    for _ in range(2):
        assert main([*command, "--count-table", "train"]) == 0
        assert capsys.readouterr().out == text
    assert (run / "counts.safetensors").is_file()
    assert main([*command, "--count-table", "missing"]) == 2
    assert "missing" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["full", "routed", "exact"])
def test_generate_streams_a_text(mode: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", str(made), "--prompt", "import ", "--max-new-tokens", "9", "--mode", mode]
    args += ["--threshold", "0.1"] if mode == "routed" else []
    assert main(args) == 0
    shown = capsys.readouterr()
    model, tokenizer = load_model(made)[0], Tokenizer.from_file(str(made / "tokenizer.json"))
    model.policy = Policy.of(1, 0.1)
    ids = torch.tensor([tokenizer.encode("import ").ids])
    answer = ease.generate(model, ids, 9, mode, stop=tokenizer.token_to_id("<eos>"))  # type: ignore[arg-type]
    assert shown.out == "import " + tokenizer.decode(answer.tokens[0].tolist()) + "\n"
    assert f"{answer.tokens.numel()} tokens" in shown.err
    assert "layer " in shown.err


def test_a_checkpoint_s_positions_are_the_limit(
    made: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    checkpoint, out = str(tmp_path / "checkpoint"), str(tmp_path / "out")
    assert main(["export", str(made), checkpoint]) == 0
    refused = [
        (
            ["tune", checkpoint, "--exits", "1", "--data", str(text_file), "--out", out, "--data.seq-len", "32"],
            "has 16",
        ),
        (["tune", str(made), "--out", out, "--dtype", "bfloat16"], "is a run with its own"),
        (
            ["generate", checkpoint, "--prompt", "import json", "--max-new-tokens", "100"],
            "exceed the model's 16 positions",
        ),
        (["eval", checkpoint], "is a checkpoint, not a run"),
    ]
    for command, says in refused:
        capsys.readouterr()
        assert main(command) == 2
        shown = capsys.readouterr()
        assert says in shown.err
        assert not shown.out
    assert main(["generate", checkpoint, "--prompt", "import json"]) == 0
    assert "6 tokens" in capsys.readouterr().err, "as many as fit"


def test_a_recipe_must_return_a_run_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text("def config():\n    return None\n")
    assert main(["run", str(tmp_path / "own.py")]) == 2
    assert "returns NoneType: return an ease.runs.RunConfig" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal as POSIX does")
def test_an_interrupted_run_saves_its_state_before_the_first_checkpoint(text_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ease", "run", "demo", "--data", str(text_file), "--out", str(tmp_path / "r")]
    with subprocess.Popen([*command, *TINY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while line := process.stderr.readline():
            if "epoch" in line:
                process.terminate()
                break
        told = process.communicate(timeout=300)[1]
    assert process.returncode == 130
    partial = tmp_path / ".r.partial"
    assert told.endswith(f"ease: interrupted; run the same command again to resume ({partial})\n")
    done = subprocess.run([*command, *TINY, *budget("6e7")], capture_output=True, text=True, timeout=300, check=False)
    assert "differs in config.strategy.phase1_max_flops" in done.stderr, "other options are another run"
    assert list((partial / "checkpoints").rglob("*.safetensors"))


MISSING = """
import runpy, sys
sys.modules |= {"lm_eval": None, "transformers": None}
try:
    import ease.hf.model
except ValueError as error:
    print(f"ease: {error}", file=sys.stderr)
runpy.run_module("ease.hf.lm_eval", run_name="__main__")
"""


def test_a_missing_extra_is_one_sentence_that_names_it() -> None:
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"ease: this needs the package {package}: pip install -e '.[{extra}]' in a checkout of ease"
        for package, extra in (("transformers", "hf"), ("lm_eval", "eval"))
    ]


def test_help_describes_the_options(capsys: pytest.CaptureFixture[str]) -> None:
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
        (["eval", "no/such/run"], "not a run folder"),
        (["report", "no/such/run"], "no/such/run"),
        (["report"], "no run given"),
        (["export", "no/such/run", "out"], "not a run folder"),
        (["generate", "no/such/model", "--prompt", "x\udcff"], "the prompt is not valid text at character 2"),
        (
            ["generate", "x", "--prompt", "y", "--threshold", "0.1", "--mode", "full"],
            "--threshold applies to mode routed",
        ),
        (["run", "demo", "--start", "x", "--model.dim", "8"], "leave out --model.*"),
        (["run", "demo", "--start", "x", "--data.tokenizer", "bpe:300"], "leave out --model.* and --data.tokenizer"),
        (["run", "tune", "--start", "x", "--data.tokenizer=bpe:2048"], "leave out --model.* and --data.tokenizer"),
        (["run", "demo", "--compare", "continued", "--compare-layers", "1"], "add standard to --compare"),
        (["run", "demo", "--data.tokenizer", f"bpe:{10**24}"], "unknown tokenizer"),
        (["run", "demo", "--data", "hf:"], "use hf:NAME"),
        (["run", "demo", "--seed", "99999999999999999999"], "seed must lie in"),
        (["run", "demo", "--dtype", "bfloat16"], "name one with --start"),
        (["tune", "--exits", "1"], "name the checkpoint first"),
        (["generate", "no/such/model", "--prompt", "x"], "no folder no/such/model"),
        (["tune", "no/such/model", "--out", "new"], "no folder no/such/model"),
        (["run", "tune", "--out", "new"], "name a checkpoint with --start"),
        (["eval", "x" * 300], "check the path and the disk"),
        (["generate", "x" * 300, "--prompt", "x"], "check the path and the disk"),
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
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (["--strategy.phase2-layers", "1"], "phase2_layers (1) must be more than phase1_layers (1)"),
        (["--strategy.hard-example-ratio", "0"], "must lie in (0, 1]"),
        (["--strategy.phase1-lr", "fast"], "phase1-lr"),
        (["--no-such-option", "1"], "no-such-option"),
        (["--data.seq-len", "0"], "seq_len must be at least 1"),
    ],
)
def test_a_bad_override_is_reported_by_name(override: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", "demo", *override])
    assert caught.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_run_in_a_process_of_its_own_prints_plain_text(text_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ease", "run", "demo", "--data", str(text_file), "--out", str(tmp_path / "r")]
    done = subprocess.run(
        [*command, *TINY, *budget("2e8"), "--compare", "continued"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "phase 1 continued" in done.stdout
    assert "Speed compared with full decoding: with 1 row, routed at " in done.stdout
    assert "epoch" in done.stderr
    assert "\ndecoding\n" in done.stderr
