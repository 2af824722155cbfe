"""transformers' own tests of a causal language model, for `EaseForCausalLM` and, to compare, for stock Llama.

They are in transformers' repository and not in its wheel. With `parameterized` and `httpx` installed:

    git clone --depth 1 --branch v5.23.0 https://github.com/huggingface/transformers
    export PYTHONPATH=transformers OMP_NUM_THREADS=1
    python -m pytest -c /dev/null -W ignore -rsfx tests/hf/transformers_suite.py

docs/reference/transformers.md states the counts, and why a test is skipped or fails.
"""

# mypy: ignore-errors

from __future__ import annotations

import unittest
from typing import ClassVar

import pytest
import torch
from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester
from transformers import LlamaForCausalLM, LlamaModel

from ease.hf.classifier import EaseForSequenceClassification
from ease.hf.model import EaseConfig, EaseForCausalLM

SEVERAL_PROCESSES = ("test_fsdp", "test_hsdp", "test_ep_")

FAILURES = {
    "test_model_weights_reload_no_missing_tied_weights": "weights without a single layer are refused as damaged",
}


class LlamaTester(CausalLMModelTester):
    base_model_class = LlamaModel


class EaseTester(CausalLMModelTester):
    base_model_class = EaseForCausalLM
    config_class = EaseConfig
    causal_lm_class = EaseForCausalLM
    sequence_classification_class = EaseForSequenceClassification

    def get_config(self) -> EaseConfig:
        names = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "pad_token_id")
        names += ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "bos_token_id", "eos_token_id")
        return EaseConfig(**{name: getattr(self, name) for name in names})

    def create_and_check_model(self, config, input_ids, _, input_mask, *__) -> None:
        model = EaseForCausalLM(config).eval()
        for mask in (input_mask, None):
            states = model(input_ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
            assert states.shape == (*input_ids.shape, self.hidden_size)


class Suite(CausalLMModelTest):
    """One class of models, without the tests that start several processes."""

    pipeline_model_mapping: ClassVar = {}

    @property
    def all_model_classes(self):
        return [self.model_tester.causal_lm_class]

    @all_model_classes.setter
    def all_model_classes(self, _) -> None:
        """Ignores the list of all classes of the tester."""


for name in dir(Suite):
    if name.startswith(SEVERAL_PROCESSES):
        setattr(Suite, name, None)


class TestLlama(Suite, unittest.TestCase):
    model_tester_class = LlamaTester
    model_split_percents: ClassVar = [0.5, 0.7, 0.8]
    _torch_compile_train_cls = LlamaForCausalLM


class TestEase(Suite, unittest.TestCase):
    model_tester_class = EaseTester
    has_attentions = False  # attention weights are never stored
    test_all_params_have_gradient = False  # the loss is that of the last exit: other exits' norms get no gradient

    # A call returns a cache by default only where gradients are off, and these two begin with such a call.
    test_generate_continue_from_past_key_values = torch.no_grad()(Suite.test_generate_continue_from_past_key_values)
    test_generate_continue_from_inputs_embeds = torch.no_grad()(Suite.test_generate_continue_from_inputs_embeds)

    def test_left_padding_compatibility(self) -> None:
        self.has_attentions = True  # the test is skipped otherwise, and needs none
        super().test_left_padding_compatibility()


for name, reason in FAILURES.items():
    setattr(TestEase, name, pytest.mark.xfail(reason=reason, strict=True)(getattr(TestEase, name)))

del CausalLMModelTest, Suite
