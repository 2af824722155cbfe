"""Corpora, tokenizers, and batches: from a source of text to `(x, y)`."""

from ease.data.batches import TokenBatches
from ease.data.corpus import Corpus, load_corpus
from ease.data.streaming import StreamBatches, load_stream
from ease.data.tasks import ExampleBatches, load_classification, load_completion
from ease.data.tokenizers import load_tokenizer

__all__ = [
    "Corpus",
    "ExampleBatches",
    "StreamBatches",
    "TokenBatches",
    "load_classification",
    "load_completion",
    "load_corpus",
    "load_stream",
    "load_tokenizer",
]
