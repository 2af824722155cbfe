"""The verdict: what it concludes from the metrics of a run, in words."""

from __future__ import annotations

from typing import Any

import pytest
from data_report import synthetic_summary, with_line

from ease.report.verdict import verdict


@pytest.mark.parametrize(
    ("changes", "tone", "headline"),
    [
        (
            {},
            "better",
            "Phase 2 beats phase 1 continued overall and on hard tokens, at equal training FLOPs.",
        ),
        (
            {"ppl": 60.0, "hard_ppl": 160.0},
            "worse",
            "Phase 2 does not beat phase 1 continued: at equal training FLOPs it is worse overall "
            "and worse on hard tokens.",
        ),
        (
            {"ppl": 42.2, "hard_ppl": 160.0},
            "worse",
            "Phase 2 does not beat phase 1 continued: at equal training FLOPs it is even overall "
            "and worse on hard tokens.",
        ),
        (
            {"ppl": 60.0},
            "mixed",
            "Mixed: compared with phase 1 continued, at equal training FLOPs, phase 2 is better on hard "
            "tokens but worse overall.",
        ),
        (
            {"ppl": 42.1, "hard_ppl": 150.9},
            "even",
            "Phase 2 and phase 1 continued are even overall and on hard tokens, at equal training FLOPs.",
        ),
        ({"hard_ppl": None}, "better", "Phase 2 beats phase 1 continued overall, at equal training FLOPs."),
        (
            {"train_flops": 21e12},
            "none",
            "No fair verdict: phase 2 had 50% more training FLOPs than phase 1 continued.",
        ),
        (
            {"train_flops": None},
            "none",
            "No verdict: training FLOPs were not recorded for both phase 2 and phase 1 continued.",
        ),
    ],
)
def test_verdict_compares_the_last_phase_with_phase_1_continued(
    changes: dict[str, Any], tone: str, headline: str
) -> None:
    summary = with_line(synthetic_summary(), "phase 2", **changes)
    judged = verdict({**summary, "lines": summary["lines"][:3]})
    assert (judged.tone, judged.headline) == (tone, headline)
    assert (judged.line, judged.against, judged.split) == ("phase 2", "phase 1 continued", "test")


@pytest.mark.parametrize(
    ("ppl", "tone", "says"),
    [
        (37.2, "mixed", "The best of 3 lines is standard: perplexity 37.20; phase 2 is 3.2% higher."),
        (38.2, "better", "The best of 3 lines is standard: perplexity 38.20, even with 38.40."),
        (39.0, "better", "It is the best of 3 lines."),
    ],
)
def test_verdict_names_the_best_line_at_equal_training_flops(ppl: float, tone: str, says: str) -> None:
    beats = "Phase 2 beats phase 1 continued overall and on hard tokens, at equal training FLOPs."
    judged = verdict(with_line(synthetic_summary(), "standard", ppl=ppl))
    assert (judged.tone, judged.headline) == (tone, f"{beats} {says}")
    dearer = verdict(with_line(synthetic_summary(), "standard", ppl=ppl, train_flops=28e12))
    assert (dearer.tone, dearer.headline) == ("better", beats), "a line with more training FLOPs is not compared"


def test_verdict_details_metrics_and_cost() -> None:
    assert verdict(synthetic_summary()).detail == (
        "Perplexity 38.40 against 42.10 (8.8% lower) overall, 128.0 against 150.0 (14.7% lower) on hard "
        "tokens, on held-out test tokens. A token costs 1.48 times the FLOPs of a token of phase 1 continued. "
        "A token costs 0.74 times the FLOPs of a token of standard. "
        "One random seed: differences under 1% count as even."
    )


def test_verdict_falls_back_to_validation_and_says_so() -> None:
    summary = synthetic_summary()
    for line in summary["lines"]:
        del line["test"]
    judged = verdict(summary)
    assert judged.split == "val"
    assert "validation tokens (choices were made on them)" in judged.detail


def test_verdict_judges_the_last_phase_against_the_line_of_nearest_training_flops() -> None:
    summary = synthetic_summary()
    first, continued, second, _ = summary["lines"]
    third = {**second, "name": "phase 3", "train_flops": 20e12}
    further = {**continued, "name": "phase 2 continued", "train_flops": 20e12}
    judged = verdict({**summary, "lines": [first, continued, second, further, third]})
    assert (judged.line, judged.against) == ("phase 3", "phase 2 continued")


def test_no_verdict_without_a_fair_baseline() -> None:
    summary = synthetic_summary()
    first, _, second, standard = summary["lines"]
    lonely = verdict({**summary, "lines": [first, second]})
    assert lonely.tone == "none"
    assert "no line that continues phase 1" in lonely.detail
    single = verdict({**summary, "lines": [standard]})
    assert single.headline == "Standard reaches perplexity 37.20 and accuracy 33.2% on held-out test tokens."
    assert verdict({"lines": [{"name": "standard"}]}).headline == "No metrics were recorded."
