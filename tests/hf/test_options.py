"""Options of `from_pretrained`: each has its effect or is refused by name, for every kind of folder and way to load."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

import ease
from ease.errors import EaseError
from ease.hf.folder import checkpoint_folder
from ease.models import DeepSupervisionTransformer

transformers = pytest.importorskip("transformers")
hub = pytest.importorskip("huggingface_hub")

from ease.hf.model import EaseForCausalLM  # noqa: E402

Load = Callable[..., Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints, "stock" and "native", of one model."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("options")
    model = DeepSupervisionTransformer(97, 32, 2, 4, max_positions=64).eval()
    ease.save_pretrained(model, out / "stock")
    EaseForCausalLM.wrap(model).save_pretrained(out / "native")
    return out


WAYS = [
    pytest.param("stock", ease.from_pretrained, id="stock-ease"),
    pytest.param("native", ease.from_pretrained, id="native-ease"),
    pytest.param("stock", EaseForCausalLM.from_pretrained, id="stock-class"),
    pytest.param("native", EaseForCausalLM.from_pretrained, id="native-class"),
    pytest.param("native", transformers.AutoModelForCausalLM.from_pretrained, id="native-auto"),
]


@pytest.mark.parametrize(("kind", "load"), WAYS)
@pytest.mark.parametrize(
    "options",
    [
        {"revision": "main", "token": "a", "local_files_only": True, "cache_dir": "there", "force_download": True},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}, "low_cpu_mem_usage": True, "trust_remote_code": True},
        {"device_map": torch.device("cpu"), "attn_implementation": "sdpa", "use_safetensors": True},
        {"dtype": "auto", "load_in_4bit": False, "quantization_config": None},
        {"device": "cpu"},
    ],
)
def test_options_that_a_single_device_follows_load_the_model(
    folders: Path, kind: str, load: Load, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected, model = ease.from_pretrained(folders / kind), load(folders / kind, **options)
    assert all(map(torch.equal, expected.parameters(), model.parameters()))


@pytest.mark.parametrize(("kind", "load"), WAYS)
def test_dtype_and_subfolder_have_their_effect(folders: Path, kind: str, load: Load) -> None:
    model = load(folders, subfolder=kind, dtype="bfloat16")
    assert next(model.parameters()).dtype == torch.bfloat16
    model = load(folders / kind, dtype=torch.float64)
    assert next(model.parameters()).dtype == torch.float64


@pytest.mark.parametrize(("kind", "load"), WAYS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"revision": "nope"}, "revision 'nope' is for a name on the Hugging Face hub"),
        ({"device_map": {"model.layers": "cpu", "model.embedding": "meta"}}, "spreads the model"),
        ({"device_map": "mars"}, "no device 'mars'"),
        ({"device_map": "meta"}, "no device 'meta'"),
        ({"device": "cpu", "device_map": "mars"}, "contradict each other"),
        ({"attn_implementation": "eager"}, "attn_implementation='eager' is not supported: use 'sdpa'"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation='flash_attention_2' is not supported"),
        ({"use_safetensors": False}, "use_safetensors=False is not supported"),
        ({"load_in_4bit": True}, "load_in_4bit is not an option that ease supports"),
        ({"proxies": {"http": "there"}}, "proxies is not an option that ease supports"),
        ({"variant": "fp16"}, "variant is not an option that ease supports"),
        ({"dtpye": "bfloat16"}, "dtpye is not an option that ease supports"),
    ],
)
def test_other_options_are_refused_by_name(
    folders: Path, kind: str, load: Load, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(EaseError, match=message):
        load(folders / kind, **options)


@pytest.mark.parametrize("load", [ease.from_pretrained, EaseForCausalLM.from_pretrained])
def test_a_map_over_all_devices_needs_a_single_one(folders: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(EaseError, match=r'device_map "auto" spreads the model over 2 devices'):
        load(folders / "stock", device_map="auto")
    with pytest.raises(EaseError, match="has no folder no"):
        load(folders, subfolder="no")
    with pytest.raises(EaseError, match="must lie in the checkpoint"):
        load(folders / "stock", subfolder="../native")


def test_a_tokenizer_has_no_options_for_weights(folders: Path) -> None:
    with pytest.raises(EaseError, match="dtype, device_map is for weights"):
        ease.hf.load_tokenizer(folders / "stock", dtype="float32", device_map="cpu")


@pytest.mark.parametrize("kind", ["stock", "native"])
def test_special_tokens_given_replace_those_of_the_checkpoint(folders: Path, kind: str) -> None:
    model, info = EaseForCausalLM.from_pretrained(folders / kind, pad_token_id=5, output_loading_info=True)
    assert model.config.pad_token_id == 5
    assert not any(info.values())


# ---------------------------------------------------------------------------------------------------------
# The hub

OTHERS = [
    "consolidated.safetensors",
    "consolidated-00001-of-00002.safetensors",
    "model.fp16.safetensors",
    "original/model.safetensors",
    "original/params.json",
    "onnx/model.onnx",
    "onnx/config.json",
    "pytorch_model.bin",
    "modeling_custom.py",
    "README.md",
    "gguf/model.gguf",
    "checkpoint-500/model.safetensors",
]


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """Makes a repository of a folder and further files that the hub's download then reads; the names it has fetched."""

    def make(folder: Path, others: list[str], below: str = "") -> list[str]:
        source, fetched = tmp_path / "repository", []
        shutil.copytree(folder, source / below, dirs_exist_ok=True)
        for name in others:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).touch()

        def download(
            name: str, *, allow_patterns: list[str] | None = None, ignore_patterns: Any = None, **given: Any
        ) -> str:
            assert name == "org/model"
            assert (given["revision"], given["token"]) == ("v1", "secret")
            names = [file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()]
            for each in hub.utils.filter_repo_objects(
                names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            ):
                fetched.append(each)
                (tmp_path / "cache" / each).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / each, tmp_path / "cache" / each)
            return str(tmp_path / "cache")

        monkeypatch.setattr(hub, "snapshot_download", download)
        return fetched

    return make


GIVEN = {"revision": "v1", "token": "secret"}


@pytest.mark.parametrize("below", ["", "weights/fine"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_name_on_the_hub_fetches_each_weight_once(
    folders: Path, repository: Callable[..., list[str]], tmp_path: Path, below: str, shards: int
) -> None:
    folder = tmp_path / "stock"
    if shards == 1:
        shutil.copytree(folders / "stock", folder)
    else:
        transformers.AutoModelForCausalLM.from_pretrained(folders / "stock").save_pretrained(
            folder, max_shard_size="40KB"
        )
        assert len(list(folder.glob("*.safetensors"))) > 1
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        (folder / name).touch()
    fetched = repository(folder, OTHERS, below)
    model = EaseForCausalLM.from_pretrained("org/model", subfolder=below, **GIVEN)
    assert all(map(torch.equal, model.parameters(), ease.from_pretrained(folders / "stock").parameters()))
    prefix = f"{below}/" if below else ""
    files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    assert sorted(fetched) == sorted(prefix + name for name in files)
    assert not any(fnmatch(name, f"*{other}") for name in fetched for other in OTHERS if "/" not in other)


def test_a_single_file_of_weights_is_preferred_to_shards_of_the_same(
    folders: Path, repository: Callable[..., list[str]]
) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    fetched = repository(folders / "stock", shards)
    ease.from_pretrained("org/model", **GIVEN)
    assert [name for name in fetched if name.endswith(".safetensors") and "/" not in name] == ["model.safetensors"]


def test_a_subfolder_that_the_hub_lacks_is_named(folders: Path, repository: Callable[..., list[str]]) -> None:
    repository(folders / "stock", [])
    with pytest.raises(EaseError, match="org/model on the Hugging Face hub has no folder no"):
        checkpoint_folder("org/model", subfolder="no", **GIVEN)
