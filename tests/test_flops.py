"""The count of FLOPs by hand; against torch's own count it is held in promises/test_fair.py."""

import torch

from ease import Layout, ModelConfig
from ease.flops import full_depth_flops, head_flops, layer_flops, real_pairs, run_flops

CONFIG = ModelConfig(100, 8, 3, 2, num_kv_heads=1, hidden_dim=20)


def test_a_layer_by_hand() -> None:
    """Keys and values 2 x 8 x 4, queries and outputs 2 x 8 x 8, feed-forward 3 x 8 x 20, each product twice."""
    assert layer_flops(CONFIG, 1, 0, 0) == 2 * 64
    assert layer_flops(CONFIG, 0, 1, 0) == 2 * (128 + 480)
    assert layer_flops(CONFIG, 0, 0, 1) == 2 * 2 * 8
    assert layer_flops(CONFIG, 7, 5, 9) == 7 * 128 + 5 * 1216 + 9 * 32
    assert head_flops(CONFIG, 3) == 2 * 3 * 8 * 100


def test_pairs_by_hand() -> None:
    active = torch.tensor([[True, False, True], [False, False, True]])
    assert real_pairs(active) == 1 + 3 + 3
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    assert real_pairs(active, Layout.from_attention_mask(mask)) == 2
    packed = Layout(torch.tensor([[0, 1, 0], [0, 0, 1]]), torch.tensor([[0, 0, 1], [0, 1, 1]]))
    assert real_pairs(active, packed) == 1 + 1 + 2
    assert real_pairs(torch.zeros(2, 3, dtype=torch.bool)) == 0


def test_those_who_left_cost_only_keys_and_values() -> None:
    everyone, nobody = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    assert run_flops(CONFIG, 3, nobody) == 3 * layer_flops(CONFIG, 10, 0, 0)
    assert run_flops(CONFIG, 3, everyone) == 3 * layer_flops(CONFIG, 10, 10, 2 * 15)
    assert run_flops(CONFIG, 0, everyone) == 0
    assert full_depth_flops(CONFIG, 5) * 5 == 3 * layer_flops(CONFIG, 5, 5, 15) + head_flops(CONFIG, 5)


def test_counts_beyond_32_bits() -> None:
    config = ModelConfig(50_000, 1024, 24, 16)
    active = torch.ones(64, 2048, dtype=torch.bool)
    assert real_pairs(active) == 64 * 2048 * 2049 // 2
    assert run_flops(config, 24, active) > 2**40
