"""Tables for the terminal: their rows, and their width."""

from __future__ import annotations

import re

import pytest
from data_report import synthetic_summary

from ease.report.tables import calibration_table, decoding_sentence, decoding_table, evaluation_table, text_table


def printed(table: object, width: int = 140) -> str:
    from rich.console import Console

    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def cells(row: str) -> list[str]:
    return re.split(r"  +", row.strip())


def test_text_table_has_one_row_a_line() -> None:
    text = printed(text_table(synthetic_summary()))
    row = next(row for row in text.splitlines() if "phase 2" in row)
    assert cells(row) == ["phase 2", "38.40", "32.9%", "128.0", "52.0%", "74.0%", "962 K", "14.1 T"]
    assert "measured on held-out test tokens" in text
    continued = next(row for row in text.splitlines() if "continued" in row)
    assert "0.0%" in continued, "a model of three layers leaves none of its own layers early"


def test_text_table_shows_dashes_and_names_as_they_are() -> None:
    text = printed(text_table({"name": "[red]x", "lines": [{"name": "[bold]odd", "test": {"ppl": float("nan")}}]}))
    assert "[red]x" in text
    assert "[bold]odd" in text
    assert text.count("–") == 7


def test_decoding_modes_are_compared_and_slower_is_called_slower() -> None:
    summary = synthetic_summary()
    text = printed(decoding_table(summary))
    rows = [cells(row) for row in text.splitlines() if re.match(r" *(full|routed|exact)", row)]
    assert rows[1] == ["routed, own policy", "1", "605", "1.21", "1.15–1.27", "4.50", "40.0%", "–"]
    assert [row[0] for row in rows] == [row["way"] for row in summary["generation"]["rows"]]
    assert "phase 2, 33 new tokens per row" in text
    assert "median and range of 3 rounds on Imaginary 9000, 1 thread" in text
    assert decoding_sentence(summary) == (
        "Speed compared with full decoding: with 1 row, routed at 1.21 times (faster) and exact at 1.01 times (even); "
        "with 8 rows, routed at 0.75 times (slower) and exact at 1.12 times (faster)."
    )


@pytest.mark.parametrize("recorded", [None, {}, {"rows": None}, {"rows": []}, {"rows": [3]}, 3])
def test_a_run_without_timed_decoding_has_no_table(recorded: object) -> None:
    summary = synthetic_summary(generation=recorded)
    assert decoding_sentence(summary) is decoding_table(summary) is None
    del summary["generation"]
    assert decoding_sentence(summary) is decoding_table(summary) is None


def test_missing_metrics_of_decoding_are_dashes() -> None:
    summary = synthetic_summary(generation={"rows": [{"way": "[red]odd"}, {"way": "routed", "ratio": float("nan")}]})
    text = printed(decoding_table(summary))
    assert "[red]odd" in text
    assert text.count("–") == 12
    assert decoding_sentence(summary) is None


def test_a_range_that_contains_full_speed_is_even() -> None:
    row = {"way": "routed, own policy", "batch": 1, "ratio": 1.12, "low": 0.93, "high": 1.4}
    assert decoding_sentence({"generation": {"rows": [row]}}) == (
        "Speed compared with full decoding: with 1 row, routed at 1.12 times (even)."
    )
    assert "(faster)" in str(decoding_sentence({"generation": {"rows": [row | {"low": 1.01}]}}))


def test_tables_fit_80_columns_and_cut_nothing() -> None:
    summary = synthetic_summary(head_in_layers=0.24)
    summary["lines"][3]["name"] = "deep-supervision, 12 layers"
    for line in summary["lines"]:
        line["train_flops"] = 123e12
        line["test"] |= {"ppl": 12345.6, "hard_ppl": 99999.9, "exit_shares": {"1": 1.0}, "compute_cost": 1.0}
    split = "half of the test split that was not used for calibration"
    row = {"thresholds": (0.1234, 0.5, 0.75, 0.9), "split": split, "ppl": 12345.6, "acc": 1.0, "shallow_ratio": 1.0}
    row |= {"compute_cost": 1.0, "flops_per_token": 1.23e9, "flops_share": 1.234, "time_share": 1.31}
    candidate = {
        "exits": [11, 12],
        "measure": "max-probability",
        "shallow_ratio": 1.0,
        "agreement": 1.0,
        "ppl": 12345.6,
    }
    candidate |= {"ppl_full": 12345.6, "flops_share": 1.234, "time_share": None, "reached": True}
    calibration = {"table": [candidate, candidate | {"reached": False}], "best": candidate, "installed": True}
    calibration |= {"calibration": {"sequences": 640}, "machine": {"cpu": "Intel(R) Xeon(R) Platinum 8481C CPU"}}
    speeds = summary["generation"]["rows"]
    speeds[0] |= {"tokens_per_second": 123456.0, "ratio": 2.34, "low": 1.25, "high": 3.75}
    for table, complete in (
        (text_table(summary), ["hard", "exit", "layers", "FLOPs", "training", "12345.6", "99999.9", "100.0%", "123 T"]),
        (decoding_table(summary), ["times", "range", "accepted", "routed, own policy", "123456", "1.25–3.75"]),
        (evaluation_table("demo", [row]), ["early", "/full", "0.1234, 0.5,", "12345.6", "1.23 G", "123.4%", "131.0%"]),
        (
            calibration_table("demo", "min agreement 0.99", calibration),
            ["12 *", "max-probability", "123.4%"],
        ),
    ):
        text = printed(table, 80)
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
        assert [part for part in complete if part not in text] == []
