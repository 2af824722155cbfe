"""The distribution that tokens are drawn from."""

import pytest
import torch

from ease import EaseError
from ease.generation.sampling import Sampling


def test_top_p_includes_the_token_that_crosses_it() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert torch.allclose(Sampling(1.0, top_p=0.6).distribution(logits, None), torch.tensor([[0.625, 0.375, 0.0]]))
    assert torch.allclose(Sampling(1.0, top_p=0.5).distribution(logits, None), torch.tensor([[1.0, 0.0, 0.0]]))


def test_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens() -> None:
    logits, seen = torch.tensor([[2.0, -2.0, 2.0]]), torch.tensor([[True, True, False]])
    assert Sampling(repetition_penalty=2.0).penalize(logits, seen).tolist() == [[1.0, -4.0, 2.0]]
    assert Sampling(repetition_penalty=2.0).penalize(logits, None) is logits


def test_nan_logits_raise() -> None:
    with pytest.raises(EaseError, match="the model's logits are NaN"):
        Sampling().penalize(torch.tensor([[0.0, torch.nan]]), None)


def test_half_precision_is_sampled_from_logits_in_float32() -> None:
    logits, seen = torch.randn(4, 500).bfloat16(), torch.rand(4, 500) < 0.5
    sampling = Sampling(0.7, top_k=100, top_p=0.9, repetition_penalty=1.1)
    distribution = sampling.distribution(logits, seen)
    assert distribution.dtype == torch.float32
    assert torch.equal(distribution, sampling.distribution(logits.float(), seen))
    assert sampling.distribution(logits.double(), seen).dtype == torch.float64
