"""Damaged files: what is loaded either works or is refused in one sentence, quickly and without much memory."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_damage import DAMAGES, damage
from data_runs import TINY, budget

import ease
from ease.cli.main import main
from ease.errors import EaseError
from ease.files import read_json, write_text
from ease.hf.checkpoint import end_of_text
from ease.hf.checkpoint import load_tokenizer as load_checkpoint_tokenizer
from ease.model_config import ModelConfig, RopeScaling
from ease.policy import Policy
from ease.report import write_report
from ease.runs.config import DataConfig
from ease.runs.reopen import data_config_of, load_start
from ease.runs.store import load_model

pytest.importorskip("huggingface_hub")


def load_run(folder: Path) -> None:
    _, config = load_model(folder)
    data_config_of(folder, config)
    load_start(str(folder))
    write_report([folder], folder.parent / "report.html")


def load_checkpoint(folder: Path) -> None:
    ease.from_pretrained(folder)
    load_checkpoint_tokenizer(folder)
    end_of_text(folder)


@pytest.fixture(scope="session")
def native(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as `EaseForCausalLM.save_pretrained` writes it: native names, and all in one config.json."""
    pytest.importorskip("transformers")
    from ease.hf.model import EaseForCausalLM

    folder = tmp_path_factory.mktemp("native") / "checkpoint"
    model = load_model(made)[0]
    EaseForCausalLM.wrap(model).save_pretrained(folder)
    shutil.copy(made / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="session")
def exported(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "checkpoint"
    assert main(["export", str(made), str(folder)]) == 0
    return folder


@pytest.fixture
def kinds(made: Path, exported: Path, native: Path) -> dict[str, tuple[Path, Callable[[Path], None]]]:
    return {"run": (made, load_run), "stock": (exported, load_checkpoint), "native": (native, load_checkpoint)}


def edit(file: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# ---------------------------------------------------------------------------------------------------------
# Sizes

CHILD = """
import resource, sys, time
import torch, ease
from pathlib import Path
from ease.errors import EaseError
from ease.runs.store import load_model
try:
    import transformers
except ImportError:
    pass
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for folder in sys.argv[2:]:
    start = time.perf_counter()
    try:
        (load_model if sys.argv[1] == "run" else ease.from_pretrained)(Path(folder))
    except EaseError as error:
        print(f"{time.perf_counter() - start:.3f} {error}")
    else:
        print("loaded")
"""

SIZES: dict[str, list[tuple[str, int]]] = {
    "run": [
        ("num_layers", 10**9),
        ("num_layers", 1),
        ("vocab_size", 10**12),
        ("dim", 2**40),
        ("hidden_dim", 10**12),
        ("num_kv_heads", 10**12),
        ("head_dim", 10**12),
        ("num_labels", 10**12),
        ("max_positions", 10**30),
        ("adapter_dim", 10**12),
    ],
    "stock": [
        ("num_hidden_layers", 10**9),
        ("vocab_size", 10**12),
        ("hidden_size", 2**40),
        ("intermediate_size", 10**12),
        ("num_attention_heads", 2**40),
        ("head_dim", 10**12),
    ],
    "native": [("num_layers", 10**9), ("vocab_size", 10**12), ("dim", 2**40)],
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory as Linux does")
@pytest.mark.parametrize("kind", SIZES)
def test_sizes_that_do_not_fit_the_weights_are_refused_before_memory_is_allocated(
    kind: str, kinds: dict[str, Any], tmp_path: Path
) -> None:
    folders = []
    for field, size in SIZES[kind]:
        folder = Path(shutil.copytree(kinds[kind][0], tmp_path / f"{field}-{size}"))
        edit(
            folder / "config.json",
            lambda c, field=field, size=size: (c if kind == "stock" else c["model"]).update({field: size}),
        )
        folders.append(folder)
    command = [sys.executable, "-c", CHILD, kind, *map(str, folders)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.splitlines()
    assert len(lines) == len(folders)
    for line, folder, (field, _) in zip(lines, folders, SIZES[kind], strict=True):
        seconds, _, message = line.partition(" ")
        assert float(seconds) < 2, line
        assert str(folder / "config.json") in message or "in config.json" in message, line
        known = {"num_kv_heads": "num_kv_heads", "adapter_dim": "adapter_dim", "num_attention_heads": "dim"}
        assert known.get(field, field) in message, line
        assert message.count(": ") >= 1, line


# ---------------------------------------------------------------------------------------------------------
# Types

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 16}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(40, rope_theta=None), "rope_theta must be a number, got None"),
        (lambda: ModelConfig(40, rope_theta=0.0), "rope_theta must be at least 1"),
        (lambda: ModelConfig(40, dim=True), "dim must be an integer, got True"),
        (lambda: ModelConfig(40, dim=64.0), "dim must be an integer, got 64.0"),
        (lambda: ModelConfig("40"), "vocab_size must be an integer, got '40'"),
        (lambda: ModelConfig(10**30), "vocab_size must be at most"),
        (lambda: ModelConfig(40, tie_embeddings=1), "tie_embeddings must be true or false"),
        (lambda: ModelConfig(40, norm_eps=math.inf), "norm_eps must be finite"),
        (lambda: ModelConfig(40, adapter_exits=[1.5], adapter_dim=4), "adapter_exits must be an integer, got 1.5"),
        (lambda: ModelConfig(40, classifier_exits="12"), "classifier_exits must be a list"),
        (lambda: ModelConfig(40, rope_scaling=3), "rope_scaling must be an object"),
        (lambda: ModelConfig(40, rope_scaling={"factor": 2}), "rope_scaling of type llama3 needs low_freq_factor, "),
        (lambda: ModelConfig(40, rope_scaling=LLAMA3 | {"factor": "8"}), "factor of rope_scaling must be a number"),
        (lambda: RopeScaling(8, 4, 4, 16), "low_freq_factor of rope_scaling"),
        (lambda: Policy((1.5,), (0.5,)), "exit_layer must be an integer, got 1.5"),
        (lambda: Policy((1,), ("0.5",)), "routing_threshold must be a number, got '0.5'"),
        (lambda: Policy((1,), (True,)), "routing_threshold must be a number, got True"),
        (lambda: Policy(3, (0.5,)), "exit_layer must be a list, got 3"),
        (lambda: Policy(always_deep=10**30), "always_deep must be at most"),
        (lambda: Policy(half_life="4"), "half_life must be a number"),
        (lambda: Policy(confidence=3), "confidence must be a string"),
        (lambda: DataConfig(seq_len=1.5), "seq_len must be an integer, got 1.5"),
        (lambda: DataConfig(batch_size=True), "batch_size must be an integer, got True"),
        (lambda: DataConfig(source=3), "source must be a string, got 3"),
        (lambda: DataConfig(max_tokens="9"), "max_tokens must be an integer"),
    ],
)
def test_fields_of_the_wrong_type_are_refused_when_they_are_set(make: Callable[[], object], message: str) -> None:
    with pytest.raises(EaseError) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "nested too deep"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b"[]", "must hold a JSON object"),
        (b"\xff", "utf-8"),
        (b"{", "damaged"),
        (b'{"a": ' + b"9" * 5000 + b"}", "damaged"),
    ],
)
def test_json_that_no_loader_can_use_is_refused_by_name(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(EaseError, match=r"config\.json is damaged") as caught:
        read_json(file, "fetch it again")
    assert message in str(caught.value)
    assert str(caught.value).endswith(": fetch it again")
    for missing in (tmp_path / "missing", file / "below"):
        with pytest.raises(EaseError, match="is missing: fetch it again"):
            read_json(missing, "fetch it again")
    with pytest.raises(EaseError, match="is damaged"):
        read_json(tmp_path, "fetch it again")


def test_a_message_is_one_line_whatever_it_quotes() -> None:
    assert str(EaseError("unknown key a\nb\x1b[2J\u2028\ud800: remove it")) == (
        "unknown key a\\nb\\x1b[2J\\u2028\\ud800: remove it"
    )


# ---------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("kind", ["run", "stock", "native"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(
    kind: str, value: float, kinds: dict[str, Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(kinds[kind][0], tmp_path / "damaged"))
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "k_proj" in name)
    weights[name][3, 1] = value
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(EaseError, match="NaN or infinite") as caught:
        kinds[kind][1](folder)
    assert str(file) in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("size", [10**9, None])
def test_the_model_of_transformers_refuses_what_ease_refuses(size: int | None, native: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from ease.hf.model import EaseForCausalLM

    folder = Path(shutil.copytree(native, tmp_path / "damaged"))
    if size:
        edit(folder / "config.json", lambda content: content["model"].update(num_layers=size))
    else:
        weights = load_file(folder / "model.safetensors")
        weights[min(weights)].fill_(math.nan)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EaseError, match="num_layers 1000000000, but" if size else "NaN or infinite"):
        EaseForCausalLM.from_pretrained(folder)


def test_exits_that_are_not_finite_are_refused(exported: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(exported, tmp_path / "damaged"))
    file = folder / "ease" / "exits.safetensors"
    weights = load_file(file)
    name = min(weights)
    weights[name][0] = math.nan
    save_file(weights, file)
    with pytest.raises(EaseError, match=f"{name} in .*exits.safetensors holds values that are NaN"):
        ease.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------
# Writing

FULL = """
import resource, signal, sys
from ease.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX does")
def test_a_full_disk_costs_one_sentence_and_no_file(made: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    for before in (None, "old"):
        if before:
            report.write_text(before)
        command = [sys.executable, "-c", FULL, "1000", "report", str(made), "--out", str(report)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("ease: The report cannot be written to ")
        assert len(done.stderr.splitlines()) == 1
        assert [file.name for file in tmp_path.iterdir()] == ([report.name] if before else [])
    assert report.read_text() == "old"

    command = [sys.executable, "-c", FULL, "1000", "export", str(made), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "could not be written" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == [report.name]


def test_a_run_that_finds_the_disk_full_at_its_end_resumes(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("EASE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    command = ["run", "demo", "--data", str(text_file), "--out", str(out), *TINY, *budget("1e8"), "--compare"]
    with monkeypatch.context() as patch:
        patch.setattr("ease.data.tokenizers.write_text", full)
        assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"ease: {out} could not be written")
    assert "No space left on device" in error
    assert not out.exists()
    assert main(command) == 0
    assert "resuming" in "".join(capsys.readouterr())
    assert (out / "tokenizer.json").is_file()


def test_a_tokenizer_that_cannot_be_written_is_an_os_error(made: Path, tmp_path: Path) -> None:
    from ease.data.tokenizers import load_tokenizer, save_tokenizer

    tokenizer = load_tokenizer(made / "tokenizer.json")
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    tokenizer.save(str(tmp_path / "library.json"))
    assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "library.json").read_bytes()
    with pytest.raises(OSError, match="missing"):  # `ease run` and `ease export` report it in one sentence
        save_tokenizer(tokenizer, tmp_path / "missing" / "tokenizer.json")


def test_a_text_replaces_the_target_of_a_link_and_passes_through_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "a")
    write_text(tmp_path / "link", "b")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "b"
    write_text(Path(os.devnull), "c")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.skipif(sys.platform == "win32", reason="modes of files as POSIX has them")
def test_weights_have_the_mode_of_other_files(made: Path, exported: Path, tmp_path: Path) -> None:
    from ease.training.checkpoint import write_state

    write_state(tmp_path / "state.safetensors", {"weights": {"a": torch.ones(2)}})
    (tmp_path / "other").touch()
    for folder in (made, exported, tmp_path):
        modes = {stat.S_IMODE(file.stat().st_mode) for file in folder.rglob("*") if file.is_file()}
        assert len(modes) == 1, folder


# ---------------------------------------------------------------------------------------------------------
# Random damage


def damaged_loads(original: Path, load: Callable[[Path], None], count: int, folder: Path) -> int:
    """Loads `count` damaged copies; returns how many of them were refused."""
    rng = random.Random(0)
    shutil.copytree(original, folder)
    names = sorted(f.relative_to(original) for f in original.rglob("*") if f.suffix in (".json", ".safetensors"))
    load(folder)
    refused = 0
    for i in range(count):
        name = rng.choice(names)
        kind = damage(folder / name, rng)
        start = time.perf_counter()
        message = ""
        try:
            load(folder)
        except EaseError as error:
            message = str(error)
            refused += 1
        except BaseException as error:
            raise AssertionError(f"damage {i} ({kind}) of {name}") from error
        assert len(message.splitlines()) <= 1, (i, name, kind)
        assert time.perf_counter() - start < 2, (i, name, kind)
        shutil.copy(original / name, folder / name)
    return refused


@pytest.mark.parametrize("kind", ["run", "stock", "native"])
def test_a_damaged_folder_loads_or_is_refused(kind: str, kinds: dict[str, Any], tmp_path: Path) -> None:
    assert damaged_loads(*kinds[kind], 60, tmp_path / "copy") > 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "stock", "native"])
def test_many_damaged_folders_load_or_are_refused(kind: str, kinds: dict[str, Any], tmp_path: Path) -> None:
    refused = damaged_loads(*kinds[kind], DAMAGES, tmp_path / "copy")
    print(f"{kind}: {refused} of {DAMAGES} refused")
    assert refused > DAMAGES // 3
