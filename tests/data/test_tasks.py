"""Tasks from JSONL files: what is read and refused, and which tokens are scored."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ease import EaseError
from ease.data.jsonl import read_jsonl
from ease.data.tasks import load_classification, load_completion
from ease.data.tokenizers import train_tokenizer

Write = Callable[..., Path]
A, B, C = ({"text": f"text {i}", "label": label} for i, label in enumerate(("no", "yes", "no")))

# ---------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_all_line_ends_a_byte_order_mark_and_empty_lines_are_read(end: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + end.join(['{"text": "a\u2028b"}', "", "  ", '{"text": "c", "more": 1}']).encode()
    )
    records = read_jsonl(path, text=(str,))
    assert [r.fields for r in records] == [("a\u2028b",), ("c",)]
    assert [r.where for r in records] == [f"{path}:1", f"{path}:4"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "is not valid JSON"),
        ("[1, 2]", "is not a JSON object"),
        ('{"text": "a"}', "lacks the field 'label' (fields: text)"),
        ('{"text": 3, "label": "no"}', "'text' must be str, got 3"),
        ('{"text": "a", "label": true}', "'label' must be str or int, got true"),
        ('{"text": "a", "label": 1.5}', "'label' must be str or int, got 1.5"),
        ('{"text": " ", "label": "no"}', "'text' is empty"),
        ('{"text": "a \\ud800", "label": "no"}', "'text' is not valid text at character 3"),
        ('{"text": "a", "label": "perhaps"}', "unknown label 'perhaps' (known: 'no', 'yes')"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, write: Write) -> None:
    folder = write(valid=[C, "", line])
    with pytest.raises(EaseError, match=re.escape(f"{folder / 'valid.jsonl'}:3") + ".*" + re.escape(message)) as error:
        load_classification(folder, "byte")
    assert "\n" not in str(error.value)


def test_missing_empty_and_undecodable_files_are_refused(write: Write) -> None:
    folder = write()
    (folder / "test.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(EaseError, match=r"test.jsonl as UTF-8"):
        load_classification(folder, "byte")
    (folder / "test.jsonl").write_text("\n\n")
    with pytest.raises(EaseError, match=r"test.jsonl has no record"):
        load_classification(folder, "byte")
    (folder / "test.jsonl").unlink()
    with pytest.raises(EaseError, match=r"has no test.jsonl: put train.jsonl, valid.jsonl, test.jsonl there"):
        load_classification(folder, "byte")


# ---------------------------------------------------------------------------------------------------------
# Examples


def test_a_label_is_the_target_of_the_last_token(write: Write) -> None:
    task = load_classification(write(), "byte")
    assert task.labels == ("no", "yes")
    ids = task.tokenizer.encode("text 1").ids
    assert task.train[1].ids.tolist() == [*ids, task.eos]
    assert task.train[1].targets.tolist() == [-100] * len(ids) + [1]


def test_labels_are_integers_or_strings_in_a_given_or_sorted_order(write: Write) -> None:
    numbers = [{"text": str(i), "label": label} for i, label in enumerate((10, 9))]
    folder = write(train=numbers, valid=[{"text": "x", "label": 9}], test=[{"text": "y", "label": 10}])
    assert load_classification(folder, "byte").labels == (9, 10)
    task = load_classification(folder, "byte", labels=[10, 8, 9])
    assert [e.targets[-1].item() for e in (*task.train, *task.val, *task.test)] == [0, 2, 2, 0]
    for labels in ([10, "9"], [10, 10]):
        folder = write(train=[{"text": str(i), "label": label} for i, label in enumerate(labels)])
        with pytest.raises(EaseError, match="give at least two, all strings or all integers"):
            load_classification(folder, "byte")


def test_only_the_completion_is_scored(write: Write) -> None:
    records = [{"prompt": "ab", "completion": "cd"}, {"prompt": "xyz", "completion": "u"}]
    task = load_completion(
        write(
            train=records,
            valid=[{"prompt": "k", "completion": "l"}],
            test=[{"prompt": "m", "completion": "n"}],
        ),
        "byte",
    )
    a, b, c, d = task.tokenizer.encode("abcd").ids
    assert task.train[0].ids.tolist() == [a, b, c, d]
    assert task.train[0].targets.tolist() == [-100, c, d, task.eos]


def test_a_warning_counts_cut_texts_and_records_left_out(write: Write) -> None:
    long, wide = {"prompt": "abcdef", "completion": "xy"}, {"prompt": "a", "completion": "123456"}
    short = {"prompt": "a", "completion": "b"}
    folder = write(train=[short, long, wide], valid=[{**short, "prompt": "c"}], test=[{**short, "prompt": "d"}])
    message = (
        r"train.jsonl \(3 records\): 1 prompts lose their beginning, 1 records are left out because their completion"
    )
    with pytest.warns(UserWarning, match=message):
        task = load_completion(folder, "byte", seq_len=5)
    assert [task.tokenizer.decode(e.ids.tolist()) for e in task.train] == ["ab", "defxy"]
    assert [e.targets.tolist().count(-100) for e in task.train] == [0, 2]
    with pytest.raises(EaseError, match=r"no record of .*train.jsonl remains"):
        load_completion(folder, "byte", seq_len=1)

    with pytest.warns(UserWarning, match=r"train.jsonl \(2 records\): 2 texts are cut to 4 tokens"):
        texts = load_classification(
            write(
                train=[{**A, "text": "abcdef"}, {**B, "text": "bcdef"}],
                valid=[{**C, "text": "c"}],
                test=[{**C, "text": "d"}],
            ),
            "byte",
            seq_len=4,
        )
    assert [texts.tokenizer.decode(e.ids.tolist()) for e in texts.train] == ["abc", "bcd"]
    assert [e.targets[-1].item() for e in texts.train] == [0, 1]


def test_records_of_train_are_left_out_of_validation(write: Write) -> None:
    with pytest.warns(UserWarning, match=r"valid.jsonl \(2 records\): 1 records are left out because an earlier split"):
        task = load_classification(write(valid=[{**A, "label": "yes"}, C]), "byte")
    assert len(task.val) == 1


@pytest.mark.parametrize(("split", "other"), [("valid", "train"), ("test", "train"), ("test", "valid")])
def test_splits_with_the_same_records_are_refused_by_name(split: str, other: str, write: Write) -> None:
    records = {
        name: [{"text": f"{name} {i}", "label": ("no", "yes")[i % 2]} for i in range(4)]
        for name in ("train", "valid", "test")
    }
    folder = write(**records | {split: records[other]})
    with pytest.raises(EaseError, match=rf"100% of {split}.jsonl is also in {other}.jsonl\).*allow_overlap=True"):
        load_classification(folder, "byte")
    assert len(load_classification(folder, "byte", allow_overlap=True).test) == 4
    prompts = {n: [{"prompt": r["text"], "completion": "x"} for r in records[n]] for n in records}
    folder = write(**prompts | {split: prompts[other]})
    with pytest.raises(EaseError, match=rf"100% of {split}.jsonl is also in {other}.jsonl"):
        load_completion(folder, "byte")


def test_rows_have_the_tokens_that_a_given_tokenizer_adds_to_a_text(write: Write) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_tokenizer("byte", [])
    tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])  # as bos
    records = [
        {"text": prompt, "label": label, "prompt": prompt, "completion": completion}
        for label, (prompt, completion) in enumerate([("ab", "c"), ("x" * 9, "y"), ("e", "c"), ("f", "c")])
    ]
    folder = write(train=records[:2], valid=[records[2] | {"label": 0}], test=[records[3] | {"label": 0}])
    a, b, c, x, y = (tokenizer.token_to_id(letter) for letter in "abcxy")
    with pytest.warns(UserWarning, match="lose their beginning"):
        first, second = load_completion(folder, tokenizer, eos=1, seq_len=5).train
    assert first.ids.tolist() == [0, a, b, c]
    assert first.targets.tolist() == [-100, -100, c, 1]
    assert second.ids.tolist() == [0, x, x, x, y], "the first token stays where the prompt is cut"
    task = load_classification(folder, tokenizer, eos=1, seq_len=12)
    assert task.train[0].ids.tolist() == [0, a, b, 1]
