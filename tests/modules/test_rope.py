"""Rotary positions: distances, precision, and scaling."""

import pytest
import torch

from ease.model_config import RopeScaling
from ease.modules.rope import rotary, rotate


def test_scores_depend_only_on_the_distance() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = []
    for start in (0, 5, 1000):
        cos, sin = rotary(torch.tensor([[start, start + 3]]), 8, 10_000.0, torch.float64)
        assert cos.shape == (1, 1, 2, 8)
        rotated_k, rotated_q = rotate(k, (cos[:, :, :1], sin[:, :, :1])), rotate(q, (cos[:, :, 1:], sin[:, :, 1:]))
        assert rotated_q.norm() == pytest.approx(q.norm().item())
        scores.append((rotated_q * rotated_k).sum().item())
    assert scores[1:] == pytest.approx(scores[:1] * 2)
    assert scores[0] != pytest.approx((q * k).sum().item())


def test_bfloat16_distinguishes_large_positions() -> None:
    cos, sin = rotary(torch.tensor([[256, 257, 4096, 4097]]), 8, 10_000.0, torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    exact = rotary(torch.tensor([[256, 257, 4096, 4097]]), 8, 10_000.0, torch.float32)
    torch.testing.assert_close(cos.float(), exact[0], rtol=0, atol=5e-3)
    torch.testing.assert_close(sin.float(), exact[1], rtol=0, atol=5e-3)


def test_scaling_keeps_high_frequencies_and_lowers_low_ones() -> None:
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)
    turns = torch.tensor([10.0, 4.0, 2.5, 1.0, 0.1])  # of a pair of dimensions within the original 64 positions
    frequencies = turns * 2 * torch.pi / 64
    kept = torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0])
    torch.testing.assert_close(scaling(frequencies, 10_000.0), frequencies * (kept + (1 - kept) / 8))
