"""Corpora, tokenizers and batches: from a source of text to the `(x, y)` that training reads.

batches      windows of a text, padded examples
corpus       a tokenized text in three splits, cached
counts       a table of n-gram counts
hub          Hugging Face data sets
jsonl        files of one JSON object per line
sources      what a corpus can be read from
streaming    corpora too large to hold
tasks        labelled texts, prompts with completions
tokenizers   training, loading, encoding
"""

from ease.data.batches import ExampleBatches, TokenBatches
from ease.data.corpus import Corpus, load_corpus
from ease.data.counts import CountTable
from ease.data.streaming import StreamBatches, load_stream
from ease.data.tasks import load_classification, load_completion
from ease.data.tokenizers import load_tokenizer

__all__ = [
    "Corpus",
    "CountTable",
    "ExampleBatches",
    "StreamBatches",
    "TokenBatches",
    "load_classification",
    "load_completion",
    "load_corpus",
    "load_stream",
    "load_tokenizer",
]
