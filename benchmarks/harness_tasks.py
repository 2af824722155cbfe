"""Two local tasks for lm-evaluation-harness, made of a text in the form of WikiText.

    python benchmarks/harness_tasks.py TEXT --out tasks [--passages 100]

- `word_perplexity`: the perplexity per word of the paragraphs of TEXT (rolling log-likelihood).
- `last_word`: the last word of a sentence, given the sentences before it, by greedy generation. As in LAMBADA (Paperno
  et al. 2016, arXiv:1606.06031) the word occurs earlier in the passage; whether a human would guess it was not tested.

TEXT has a paragraph per line and a space before each punctuation mark. Passages come from paragraphs in their order.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

SHORTEST, LONGEST = 40, 120  # words of a passage before the word to guess

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{target}}}}"
"""

WORD_PERPLEXITY = """\
output_type: loglikelihood_rolling
metric_list: [{metric: word_perplexity}]
"""

LAST_WORD = """\
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
filter_list:
- {name: first-word, filter: [{function: regex, regex_pattern: '^\\s*(\\w+)'}, {function: take_first}]}
metric_list: [{metric: exact_match}]
"""


def passage(paragraph: str) -> tuple[str, str] | None:
    """A context and the word that follows it: the last of a sentence, which occurs earlier in the paragraph."""
    words = paragraph.split()
    for place in range(SHORTEST, min(LONGEST, len(words) - 1)):
        word = words[place]
        if words[place + 1] == "." and re.fullmatch("[a-z]{4,}", word) and word in words[:place]:
            return " ".join(words[:place]), word
    return None


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs that are no headings."""
    for line in text.splitlines():
        if len(line.split()) > SHORTEST:
            yield line.strip()


def write_task(folder: Path, name: str, rest: str, rows: list[dict[str, str]]) -> None:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    task = TASK.format(name=name, file=json.dumps(str(file.resolve()))) + rest
    (folder / f"{name}.yaml").write_text(task, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, default=Path("tasks"), help="the folder to write")
    parser.add_argument("--passages", type=int, default=100, help="documents of each task at most")
    given = parser.parse_args()
    found = [*paragraphs(given.text.read_text(encoding="utf-8"))]
    given.out.mkdir(parents=True, exist_ok=True)
    whole = [{"context": "", "target": paragraph} for paragraph in found]
    guess = [dict(zip(("context", "target"), pair, strict=True)) for pair in map(passage, found) if pair]
    for name, rest, rows in (("word_perplexity", WORD_PERPLEXITY, whole), ("last_word", LAST_WORD, guess)):
        write_task(given.out, name, rest, rows[: given.passages])
        print(f"{given.out / name}.yaml: {min(len(rows), given.passages)} of {len(rows)} documents")


if __name__ == "__main__":
    main()
