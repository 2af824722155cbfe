"""Published configurations: with all their keys, at tiny sizes, they compute what stock transformers computes."""

import json
from pathlib import Path

import pytest

from ease import EaseError
from ease.hf.config import read_config
from experiments.studies import published_configs as study

REFUSED = {  # configuration -> what the sentence names
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": "attn_factor",
    "microsoft/phi-2": "model_type 'phi'",
    "stabilityai/stablelm-2-1_6b": "model_type 'stablelm'",
    "bigcode/starcoder2-15b": "model_type 'starcoder2'",
    "CohereLabs/aya-23-8B": "model_type 'cohere'",
    "internlm/internlm2_5-7b-chat": "model_type 'internlm2'",
    "zai-org/glm-4-9b-chat-hf": "model_type 'glm'",
    "swiss-ai/Apertus-8B-Instruct-2509": "model_type 'apertus'",
    "baichuan-inc/Baichuan2-7B-Chat": "model_type 'baichuan'",
    "LGAI-EXAONE/EXAONE-3.0-7.8B-Instruct": "model_type 'exaone'",
    "nvidia/Nemotron-Mini-4B-Instruct": "model_type 'nemotron'",
}

# Keys and values that test_families.py does not have: names of activations, patterns in letters, lists of layers,
# factors of a stretching in the keys of earlier versions of transformers.
DISTINCT = [
    "google/gemma-7b-it",
    "google/gemma-2-9b",
    "allenai/Olmo-3-7B-Instruct",
    "LGAI-EXAONE/EXAONE-4.0-32B",
    "BSC-LT/salamandra-2b-instruct",
]

PUBLISHED = study.published()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_read_or_refused_by_name(name: str) -> None:
    if name in REFUSED:
        with pytest.raises(EaseError, match=REFUSED[name]):
            read_config(PUBLISHED[name])
    else:
        config = read_config(PUBLISHED[name])
        assert config.num_layers == PUBLISHED[name]["num_hidden_layers"]


@pytest.mark.parametrize("name", DISTINCT)
def test_a_published_configuration_computes_what_stock_computes(name: str, tmp_path: Path) -> None:
    assert study.compare(PUBLISHED[name], tmp_path)[0] == "equal"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in {*REFUSED, *DISTINCT}])
def test_every_published_configuration_computes_what_stock_computes(name: str, tmp_path: Path) -> None:
    assert study.compare(PUBLISHED[name], tmp_path)[0] == "equal"


def test_tiny_configurations_keep_keys_and_what_depends_on_layers() -> None:
    published = PUBLISHED["allenai/Olmo-3-7B-Instruct"]
    tiny = study.tiny(published)
    assert tiny.keys() == published.keys()
    assert tiny["layer_types"] == published["layer_types"][: tiny["num_hidden_layers"]]
    window = tiny["sliding_window"] / tiny["rope_scaling"]["original_max_position_embeddings"]
    assert window == published["sliding_window"] / published["rope_scaling"]["original_max_position_embeddings"]
    assert tiny["sliding_window"] < study.T
    assert json.loads(json.dumps(tiny)) == tiny
