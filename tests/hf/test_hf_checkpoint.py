"""Checkpoints of every family: the same results as transformers, both ways; what does not fit is refused by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ease
from ease.data.tokenizers import load_tokenizer as load_tokenizer_file
from ease.data.tokenizers import train_tokenizer
from ease.errors import EaseError
from ease.hf.checkpoint import load_tokenizer
from ease.hf.config import read_config
from ease.interface import Layout
from ease.models import DeepSupervisionTransformer, StandardTransformer
from ease.policy import Policy
from ease.routing.forward import route

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": {"model_type": "llama"},
    "llama-mha-tied": {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-head-dim": {"model_type": "mistral", "sliding_window": None, "head_dim": 10, "num_attention_heads": 6},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 1, 1]},
}

Stock = Any


def stock_model(family: str, **changes: Any) -> Stock:
    """A random model of transformers, with weights and norms far from their initial values."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**(SHAPE | FAMILIES[family] | changes))
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.uniform_(0.5, 1.5) if "norm" in name else weight.normal_(std=0.3)
    return model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a stock checkpoint folder: `checkpoint("qwen2")`. It is shared: copy before you change it."""
    made: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "stock"
            stock_model(family).save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture
def llama(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A stock Llama to damage."""
    return Path(shutil.copytree(checkpoint(), tmp_path / "llama"))


def edit(folder: Path, **changes: Any) -> Path:
    """Sets keys of config.json; `...` takes a key out."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return folder


def stock_logits(folder: Path, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **arguments).eval()
    with torch.no_grad():
        return model(ids).logits


def ids(T: int = 24, B: int = 2) -> torch.Tensor:
    return torch.randint(0, 97, (B, T), generator=torch.Generator().manual_seed(1))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------
# Every family, both ways


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_gives_the_logits_of_transformers_both_ways(
    checkpoint: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    folder, x = checkpoint(family), ids(200)  # far past max_position_embeddings and the original 16 of llama3
    expected = stock_logits(folder, x)
    model = ease.from_pretrained(folder)
    with torch.no_grad():
        close(model(x), expected)
    assert model.trained_exits == {3}
    for norm in model.exit_norms:
        assert torch.equal(norm.weight, model.exit_norms[-1].weight)

    ease.save_pretrained(model, tmp_path / "out")
    close(stock_logits(tmp_path / "out", x), expected)
    stored = load_file(folder / "model.safetensors")
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == back.keys()
    assert all(torch.equal(stored[name], back[name]) for name in stored)


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_real_token(checkpoint: Callable[..., Path], family: str, side: str) -> None:
    folder, x = checkpoint(family), ids(20, 3)
    mask = torch.ones_like(x)
    for row, padding in enumerate((0, 5, 11)):
        mask[row, slice(0, padding) if side == "left" else slice(20 - padding, 20)] = 0
    stock, model = transformers.AutoModelForCausalLM.from_pretrained(folder), ease.from_pretrained(folder)
    layout = Layout.from_attention_mask(mask)
    with torch.no_grad():
        expected = stock(x, attention_mask=mask, position_ids=layout.positions).logits
        got = model.logits(model.run(model.embed(x), 1, 3, layout=layout), 3)
    close(got[mask.bool()], expected[mask.bool()])
    assert torch.equal(route(model, x, attention_mask=mask).logits[mask.bool()], got[mask.bool()])


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3"])
def test_bfloat16_is_as_near_to_float32_as_transformers_own(checkpoint: Callable[..., Path], family: str) -> None:
    folder, x = checkpoint(family), ids()
    exact = stock_logits(folder, x)
    stock = stock_logits(folder, x, dtype=torch.bfloat16).float()
    model = ease.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        got = model(x).float()
    # Both round at every step, but not at the same steps, so the mean error is compared with transformers' own.
    assert (got - exact).abs().mean() < 1.25 * (stock - exact).abs().mean()


@pytest.mark.parametrize("family", ["llama", "llama3"])
def test_shards_load_as_one_file_does(checkpoint: Callable[..., Path], tmp_path: Path, family: str) -> None:
    stock_model(family).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole, sharded = ease.from_pretrained(checkpoint(family)), ease.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), sharded.parameters(), strict=True))


def test_the_dtype_is_the_stored_one_unless_given(tmp_path: Path) -> None:
    stock_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert next(ease.from_pretrained(tmp_path).parameters()).dtype == torch.bfloat16
    assert next(ease.from_pretrained(tmp_path, dtype=torch.float64).parameters()).dtype == torch.float64


def test_defaults_of_every_family_are_those_of_transformers(tmp_path: Path) -> None:
    shape = {key: SHAPE[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    for family in ("llama", "mistral", "qwen2", "qwen3", "smollm3"):
        given = {"model_type": family, "num_attention_heads": 32, **shape}
        given |= {"smollm3": {"no_rope_layers": [1] * 3}, "mistral": {"sliding_window": None}}.get(family, {})
        (tmp_path / "config.json").write_text(json.dumps(given | {"hidden_size": 128}))
        stock = transformers.AutoConfig.from_pretrained(tmp_path)
        native = read_config(json.loads((tmp_path / "config.json").read_text()))
        assert native.kv_heads == stock.num_key_value_heads, family
        assert native.head_size == (getattr(stock, "head_dim", None) or 4), family
        assert native.norm_eps == stock.rms_norm_eps, family
        assert native.rope_theta == stock.rope_parameters["rope_theta"], family
        assert native.tie_embeddings == stock.tie_word_embeddings, family
        assert native.max_positions == stock.max_position_embeddings, family


def test_old_and_new_forms_of_rope_settings_are_equal(llama: Path) -> None:
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    new = ease.from_pretrained(edit(llama, rope_parameters=LLAMA3)).config
    old = ease.from_pretrained(edit(llama, rope_parameters=..., rope_theta=500.0, rope_scaling=scaling)).config
    older = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    assert new == old == ease.from_pretrained(edit(llama, rope_scaling=older)).config
    assert new.rope_scaling is not None


def test_rotary_frequencies_of_older_checkpoints_are_ignored(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, llama / "model.safetensors")
    close(ease.from_pretrained(llama)(ids()), stock_logits(llama, ids()))


def test_a_tied_head_may_be_stored_twice_if_both_are_equal(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("qwen2"), tmp_path / "tied"))
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors")
    model = ease.from_pretrained(folder)
    assert model.output_head.weight is model.embedding.weight
    save_file(tensors | {"lm_head.weight": embedding + 1}, folder / "model.safetensors")
    with pytest.raises(EaseError, match="tie_word_embeddings"):
        ease.from_pretrained(folder)


MEMORY = """
import sys, torch, ease, safetensors.torch
def kib(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
dtype = getattr(torch, sys.argv[2])
ease.from_pretrained(sys.argv[3])  # imports must not count as weights
before = kib("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
model = ease.from_pretrained(sys.argv[1], dtype=dtype)
peak, weights = kib("VmHWM") - before, sum(p.numel() * p.itemsize for p in model.parameters()) / 1024
print(peak / weights, weights / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_loading_holds_the_weights_once_and_little_more(tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
    model = stock_model("llama", **shape, vocab_size=16_000).to(torch.bfloat16)  # 41M parameters
    model.save_pretrained(tmp_path)
    for dtype in ("bfloat16", "float32"):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, tmp_path, dtype, checkpoint()], capture_output=True, text=True, check=True
        )
        ratio, megabytes = map(float, done.stdout.split())
        assert megabytes > 70
        assert ratio < 1.2, f"{dtype}: {ratio:.3f} times the weights"


# ---------------------------------------------------------------------------------------------------------
# Saving


def own_model(**options: Any) -> DeepSupervisionTransformer:
    model = DeepSupervisionTransformer(97, 32, 3, 4, exit_layer=[1, 2], routing_threshold=[0.3, 0.2], **options)
    with torch.no_grad():
        for norm in model.exit_norms:
            norm.weight.uniform_(0.5, 1.5)
    model.trained_exits = {1, 2, 3}
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_embeddings": True, "num_kv_heads": 2, "dropout": 0.1},
        {"qkv_bias": True, "hidden_dim": 40},
        {"qk_norm": True, "head_dim": 10, "max_positions": 77},
    ],
)
def test_a_native_model_loads_in_transformers_and_comes_back_bit_identical(
    tmp_path: Path, options: dict[str, Any], even_policy: Callable[..., Policy]
) -> None:
    model, x = own_model(**options), ids()
    policy = even_policy(model, x, (1, 2))
    model.policy = policy
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "bias" in name:
                weight.normal_()
        ease.save_pretrained(model, tmp_path / "out")
        close(stock_logits(tmp_path / "out", x), model(x))
        back = ease.from_pretrained(tmp_path / "out")
        assert all(torch.equal(a, b) for a, b in zip(model.forward_all_layers(x), back.forward_all_layers(x)))
    assert (back.config, back.trained_exits) == (model.config, model.trained_exits)
    assert torch.equal(route(model, x).exits, route(back, x).exits)
    assert len(route(back, x).exits.unique()) == 3
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "ease",
        "generation_config.json",
        "model.safetensors",
    ]


def test_parameters_of_exits_are_saved_by_their_prefix(tmp_path: Path) -> None:
    model, x = own_model(), ids()
    model.add_adapters([1, 2], 8)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "adapter" in name:
                weight.normal_(std=0.1)
    ease.save_pretrained(model, tmp_path / "out")
    back = ease.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model.forward_all_layers(x), back.forward_all_layers(x)))
        close(stock_logits(tmp_path / "out", x), model(x))
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "exit" in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draft_brick_is_kept_beside_a_stock_checkpoint_and_in_a_native_one(tmp_path: Path, dtype: Any) -> None:
    from ease.hf.model import EaseForCausalLM

    model, x = own_model(tie_embeddings=True).to(dtype), ids()
    model.add_draft_brick(torch.randperm(97)[:50], torch.randn(9, 32))
    ease.save_pretrained(model, tmp_path / "out")
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "draft" in name]
    EaseForCausalLM.wrap(model).save_pretrained(tmp_path / "native")
    with torch.no_grad():
        if dtype == torch.float32:
            close(stock_logits(tmp_path / "out", x), model(x))
        states = model.forward_to_layer(x, 3)
        for back in (
            ease.from_pretrained(tmp_path / "out"),
            ease.from_pretrained(tmp_path / "native"),
            EaseForCausalLM.from_pretrained(tmp_path / "native").model,
        ):
            assert back.config == model.config
            assert back.draft_brick.vocabulary.equal(model.draft_brick.vocabulary)
            assert torch.equal(back.draft_logits(back.draft(states, x)), model.draft_logits(model.draft(states, x)))
    stored = load_file(tmp_path / "out/ease/exits.safetensors")
    save_file(stored | {"draft_brick.vocabulary": torch.rand(50)}, tmp_path / "out/ease/exits.safetensors")
    with pytest.raises(EaseError, match=r"draft_brick.vocabulary in .* is stored as F32"):
        ease.from_pretrained(tmp_path / "out")


def test_no_stock_family_has_both_biases_and_norms(tmp_path: Path) -> None:
    with pytest.raises(EaseError, match="qwen2, the closest, differs in qk_norm"):
        ease.save_pretrained(own_model(qkv_bias=True, qk_norm=True), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_is_saved_with_its_special_tokens(tmp_path: Path) -> None:
    text = "def f(x):\n    return x  # <eos> is text here\n"
    tokenizer = train_tokenizer("byte", [text])
    model = StandardTransformer(tokenizer.get_vocab_size(), 32, 2, 4).eval()
    ease.save_pretrained(model, tmp_path / "out", tokenizer=tokenizer)
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert stock(text)["input_ids"] == tokenizer.encode(text).ids == load_tokenizer(tmp_path / "out").encode(text).ids
    assert (stock.pad_token_id, stock.eos_token_id) == (0, 1)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (loaded.config.eos_token_id, loaded.generation_config.eos_token_id) == (1, 1)
    assert (loaded.config.pad_token_id, loaded.config.bos_token_id) == (0, None)

    ease.save_pretrained(model, tmp_path / "other", tokenizer=tokenizer, eos=tokenizer.token_to_id("x"))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "other").eos_token == "x"

    # From folder to folder all files are copied unchanged.
    (tmp_path / "out" / "chat_template.jinja").write_text("{{ messages }}")
    ease.save_pretrained(ease.from_pretrained(tmp_path / "out"), tmp_path / "two", tokenizer=tmp_path / "out")
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "out" / name).read_text(), name


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    tokenizer = train_tokenizer("byte", [])
    ease.save_pretrained(StandardTransformer(200, 32, 2, 4), tmp_path / "out", tokenizer=tokenizer)
    assert load_tokenizer_file(tmp_path / "out" / "tokenizer.json")
    with pytest.raises(EaseError, match="ids up to 257, but the model's embedding has 200 rows"):
        load_tokenizer(tmp_path / "out")


FULL_DISK = """
import resource, sys, ease
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # limits every file, as a nearly full disk does
try:
    ease.save_pretrained(ease.StandardTransformer(97, 32, 3, 4), sys.argv[1])
except ease.EaseError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX does")
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    # In a separate process, since the limit also applies to the file that the output of the tests may go to.
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path / "out"], capture_output=True, text=True)
    assert "could not be written" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    ease.save_pretrained(own_model(), tmp_path / "out")
    with pytest.raises(EaseError, match="exists already"):
        ease.save_pretrained(own_model(), tmp_path / "out")
    ease.save_pretrained(own_model(qk_norm=True), tmp_path / "out", overwrite=True)
    assert ease.from_pretrained(tmp_path / "out").config.qk_norm


# ---------------------------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "'mixtral'"),
        ({"model_type": ...}, "ease export"),
        ({"num_experts": 8}, "num_experts"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3}, "sliding_attention"),
        ({"rope_parameters": {"rope_type": "proportional", "factor": 2.0}}, "'proportional'"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"attention_bias": True}, "lacks model.layers.0.self_attn.k_proj.bias"),
        ({"mlp_bias": True}, "lacks model.layers.0.mlp.down_proj.bias"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers in config.json is 1000000000, above 10000"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"hidden_size": 31, "head_dim": 8}, "hidden_size 31, but the weights have 32"),
        ({"num_hidden_layers": 2}, "num_hidden_layers 2, but the weights have 3 layers"),
        ({"num_hidden_layers": 4}, "num_hidden_layers 4, but the weights have 3 layers"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"num_attention_heads": 3}, "must divide"),
        ({"intermediate_size": -1}, "intermediate_size in config.json must be at least 1"),
        ({"num_attention_heads": 0, "head_dim": ...}, "num_attention_heads in config.json must be at least 1"),
        ({"rope_scaling": "x"}, "rope_scaling in config.json must be an object"),
        ({"rope_parameters": 3}, "rope_scaling in config.json must be an object"),
        ({"rope_parameters": ..., "rope_theta": "abc"}, "rope_theta in config.json must be a number, got 'abc'"),
        ({"rope_parameters": ..., "rope_theta": None}, "rope_theta in config.json must be a number, got None"),
        ({"rms_norm_eps": "a"}, "rms_norm_eps in config.json must be a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings in config.json must be true or false"),
        ({"hidden_size": True}, "hidden_size in config.json must be an integer"),
        ({"model_type": "qwen2"}, "lacks model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_unsupported_keys_and_values_are_refused_by_name(llama: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EaseError, match=message) as caught:
        ease.from_pretrained(edit(llama, **changes))
    assert "\n" not in str(caught.value)


def edit_policy(folder: Path, **changes: Any) -> None:
    ease.save_pretrained(own_model(), folder, overwrite=True)
    path = folder / "ease" / "policy.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def damage_index(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def point_index(folder: Path, shard: object) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json is damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled weights only"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "is damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b"123"), "is damaged"),
        (damage_index, "model-00002-of-.* is missing"),
        (lambda f: save_file({"a": torch.ones(1)}, f / "model.safetensors"), "the weights have no layers"),
        (lambda f: save_file({"layers.2.a": torch.ones(1)}, f / "model.safetensors"), "and 27 more tensors"),
        (
            lambda f: save_file(
                {k: v.to(torch.int8) for k, v in load_file(f / "model.safetensors").items()}, f / "model.safetensors"
            ),
            "stored as I8",
        ),
        (lambda f: edit_policy(f, format=9), "format 9"),
        (lambda f: edit_policy(f, exits=...), "is damaged"),
        (lambda f: edit_policy(f, calibration=[1]), "is damaged"),
        (lambda f: point_index(f, 3), "does not name shards in its own folder"),
        (lambda f: point_index(f, "../other/model.safetensors"), "does not name shards in its own folder"),
        (
            lambda f: edit_policy(f, exits=[1, 7]),
            "exit_layer 7",
        ),
        (
            lambda f: ease.save_pretrained(own_model(), f, overwrite=True) or (f / "ease/exits.safetensors").unlink(),
            "exits.safetensors is missing",
        ),
    ],
)
def test_a_damaged_folder_is_reported_in_one_sentence(llama: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(llama)
    with pytest.raises(EaseError, match=message) as caught:
        ease.from_pretrained(llama)
    assert "\n" not in str(caught.value)


def test_a_name_unknown_to_disk_and_hub_is_reported_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, message in (("./no/such", "there is no folder"), ("no-such-org/no-such-model", "check the name and the")):
        with pytest.raises(EaseError, match=message) as caught:
            ease.from_pretrained(name)
        assert "\n" not in str(caught.value)


def test_a_folder_without_tokenizer_is_reported(llama: Path) -> None:
    with pytest.raises(EaseError, match=r"has no tokenizer\.json: .*save_pretrained"):
        load_tokenizer(llama)


def test_dtypes_have_names_and_a_missing_library_is_reported(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert next(ease.from_pretrained(llama, dtype="float16").parameters()).dtype == torch.float16
    with pytest.raises(EaseError, match="no device 'tpu'"):
        ease.from_pretrained(llama, device="tpu")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for make in (lambda: ease.from_pretrained("org/model"), lambda: ease.save_pretrained(own_model(), llama / "out")):
        with pytest.raises(EaseError, match=r"package huggingface_hub: pip install -e '\.\[hf\]'"):
            make()
