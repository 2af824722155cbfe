"""The report: what it says, that it stays whole and offline, and that it works in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_report import run_folder, synthetic_explorer, synthetic_summary

from ease.errors import EaseError
from ease.report.page import write_report
from ease.report.tables import decoding, decoding_table, text_table
from ease.report.verdict import verdict

# ---------------------------------------------------------------------------------------------------------
# The verdict


def with_line(summary: dict[str, Any], name: str, **changes: Any) -> dict[str, Any]:
    """The summary with the test figures (or the training FLOPs) of one line changed."""
    for line in summary["lines"]:
        if line["name"] == name:
            line["train_flops"] = changes.pop("train_flops", line["train_flops"])
            line["test"].update(changes)
    return summary


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
def test_verdict_says_plainly_what_the_figures_say(changes: dict[str, Any], tone: str, headline: str) -> None:
    judged = verdict(with_line(synthetic_summary(), "phase 2", **changes))
    assert (judged.tone, judged.headline) == (tone, headline)
    assert (judged.line, judged.against, judged.split) == ("phase 2", "phase 1 continued", "test")


def test_verdict_shows_its_figures_the_price_and_a_better_baseline() -> None:
    assert verdict(synthetic_summary()).detail == (
        "Perplexity 38.40 against 42.10 (8.8% lower) overall, 128.0 against 150.0 (14.7% lower) on hard "
        "tokens, on held-out test tokens. Its tokens cost 1.48 times the FLOPs of those of phase 1 "
        "continued. The lowest perplexity of all lines is that of standard: 37.20. "
        "One seed: differences under 1% count as even."
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


def test_verdict_without_a_fair_opponent_claims_nothing() -> None:
    summary = synthetic_summary()
    first, _, second, standard = summary["lines"]
    lonely = verdict({**summary, "lines": [first, second]})
    assert lonely.tone == "none"
    assert "no line that continues phase 1" in lonely.detail
    single = verdict({**summary, "lines": [standard]})
    assert single.headline == "Standard reaches perplexity 37.20 and accuracy 33.2% on held-out test tokens."
    assert verdict({"lines": [{"name": "standard"}]}).headline == "No figures were recorded."


# ---------------------------------------------------------------------------------------------------------
# The terminal's tables


def printed(table: object) -> str:
    from rich.console import Console

    console = Console(width=140)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_text_table_has_one_row_a_line() -> None:
    text = printed(text_table(synthetic_summary()))
    row = next(row for row in text.splitlines() if "phase 2" in row)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "phase 2",
        "38.40",
        "32.9%",
        "128.0",
        "52.0%",
        "74.0%",
        "962 K",
        "14.1 T",
    ]
    assert "measured on held-out test tokens" in text
    continued = next(row for row in text.splitlines() if "continued" in row)
    assert "0.0%" in continued, "a model of three layers leaves none of its own layers early"


def test_text_table_shows_dashes_and_names_as_they_are() -> None:
    text = printed(text_table({"name": "[red]x", "lines": [{"name": "[bold]odd", "test": {"ppl": float("nan")}}]}))
    assert "[red]x" in text
    assert "[bold]odd" in text
    assert text.count("–") == 7


def test_the_ways_to_decode_stand_side_by_side_and_slower_is_called_slower() -> None:
    summary = synthetic_summary()
    text = printed(decoding_table(summary))
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in text.splitlines() if "│" in row]
    assert rows[1] == ["routed, own policy", "1", "605", "1.21", "4.50", "40.0%", "–"]
    assert [row[0] for row in rows] == [row["way"] for row in summary["generation"]["rows"]]
    assert "phase 2, 33 new tokens a row" in text
    assert "median of 3 rounds on Imaginary 9000, 1 thread(s)" in text
    assert decoding(summary) == (
        "Speed beside full decoding: with 1 row, routed at 1.21 times (faster) and exact at 1.01 times (even); "
        "with 8 rows, routed at 0.75 times (slower) and exact at 1.12 times (faster)."
    )


@pytest.mark.parametrize("told", [None, {}, {"rows": None}, {"rows": []}, {"rows": [3]}, 3])
def test_a_run_that_timed_no_decoding_says_nothing_of_it(told: object) -> None:
    summary = synthetic_summary(generation=told)
    assert decoding(summary) is decoding_table(summary) is None
    del summary["generation"]
    assert decoding(summary) is decoding_table(summary) is None


def test_figures_of_decoding_that_are_missing_are_dashes() -> None:
    summary = synthetic_summary(generation={"rows": [{"way": "[red]odd"}, {"way": "routed", "ratio": float("nan")}]})
    text = printed(decoding_table(summary))
    assert "[red]odd" in text
    assert text.count("–") == 10
    assert decoding(summary) is None


# ---------------------------------------------------------------------------------------------------------
# The page, as a file


def embedded(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_report_is_one_small_file_that_loads_nothing(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", synthetic_summary(), synthetic_explorer())
    out = write_report([run], tmp_path / "new" / "report.html")
    assert out == tmp_path / "new" / "report.html"
    page = out.read_text("utf-8")
    assert len(page.encode()) < 300_000
    assert "default-src 'none'" in page, "the browser itself forbids any request"
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(|<link|<img|<iframe""", page)
    # The XML namespaces are the only addresses, and they are names that nothing fetches.
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {
        "http://www.w3.org/1999/xhtml",
        "http://www.w3.org/2000/svg",
    }
    assert str(tmp_path) not in page


def test_report_embeds_text_as_data_only(tmp_path: Path) -> None:
    hostile = "</script><b>bold</b><script>alert(1)</script>"
    summary = synthetic_summary(name=hostile, note="<i>&amp; @@STYLE@@ @@SCRIPT@@")
    run = run_folder(tmp_path / "run", summary, synthetic_explorer([hostile, "<!--", "\u2028", "\ud800", "\x00"]))
    page = write_report([run], tmp_path / "report.html").read_text("utf-8")
    assert "</script><b>" not in page
    assert "<!--" not in page
    assert page.count("</script>") == 2
    data = embedded(page)["runs"][0]
    assert data["explorer"]["tokens"] == [hostile, "<!--", "\u2028", "\ud800", "\x00"]
    assert data["summary"]["note"] == "<i>&amp; @@STYLE@@ @@SCRIPT@@"


def test_report_turns_figures_that_are_not_finite_into_gaps(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", with_line(synthetic_summary(), "phase 2", ppl=float("inf"), acc=float("nan")))
    figures = embedded(write_report([run], tmp_path / "report.html").read_text("utf-8"))["runs"][0]["summary"]["lines"][
        2
    ]["test"]
    assert figures["ppl"] is None
    assert figures["acc"] is None


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / name, synthetic_summary()) for name in ("seed0", "seed1")]
    data = embedded(write_report(runs, tmp_path / "report.html").read_text("utf-8"))
    assert [run["label"] for run in data["runs"]] == ["synthetic (seed0)", "synthetic (seed1)"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is not a run folder: it holds no summary.json."),
        ({"summary.json": b'{"format": 1, "li'}, "is damaged or cannot be read: run it again."),
        ({"summary.json": b"\xff\xfe\x00"}, "is damaged or cannot be read: run it again."),
        ({"summary.json": b"[1]"}, "is damaged (it holds no JSON object): run it again."),
        ({"summary.json": b'{"format": 2}'}, "has format 2 and this version of ease reads format 1"),
        (
            {"summary.json": b'{"format": 1, "lines": []}'},
            "is damaged (its lines cannot be read): run it again.",
        ),
        (
            {"summary.json": b'{"format": 1, "lines": [{"name": "a", "test": 3}]}'},
            "is damaged (its lines cannot be read)",
        ),
        (
            {"summary.json": b'{"format": 1, "lines": [{"name": "a"}]}', "explorer.json": b"{"},
            "explorer.json is damaged",
        ),
    ],
)
def test_a_damaged_run_is_told_in_one_sentence(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(EaseError) as caught:
        write_report([tmp_path], tmp_path / "report.html")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert not (tmp_path / "report.html").exists()


def test_bad_arguments_are_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(EaseError, match="No run folder was given"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(EaseError, match="is not a run folder"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    run = run_folder(tmp_path / "run", synthetic_summary())
    with pytest.raises(EaseError, match="name another file"):
        write_report([run], tmp_path)


# ---------------------------------------------------------------------------------------------------------
# The page, in a real browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium with its chromedriver on the PATH")
    from selenium.webdriver.chrome.service import Service

    options = selenium.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    quiet = "--disable-quic --no-first-run --disable-background-networking --disable-component-update"
    # Without motion a click lands where the page is, not where it is scrolling to.
    quiet += " --disable-sync --force-prefers-reduced-motion"
    for flag in f"--headless=new --no-sandbox --disable-gpu {quiet} --window-size=1200,900".split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    opened = selenium.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


def visit(browser: Any, page: Path) -> Any:
    from selenium.webdriver.support.wait import WebDriverWait

    browser.get(page.as_uri())
    WebDriverWait(browser, 20).until(lambda b: b.find_elements("css selector", "footer"))
    return browser


def settled(browser: Any, condition: str) -> None:
    """Wait until a JavaScript expression holds."""
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(browser, 20).until(lambda b: b.execute_script(f"return {condition}"), condition)


def complaints(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def test_browser_draws_the_page(browser: Any, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", synthetic_summary(), synthetic_explorer())
    visit(browser, write_report([run], tmp_path / "report.html"))
    # The curves, quality against compute, and reliability at two exits.
    settled(browser, "document.querySelectorAll('.plot svg').length === 4")
    text = browser.find_element("tag name", "main").text
    for said in (
        "demo-sized budget: made-up figures",
        "✓ better",
        "Phase 2 beats phase 1 continued overall",
        "in-sample: measured on tokens that training saw",
        "measured on the held-out test split, 48,000 tokens",
        "Speed beside full decoding: with 1 row, routed at 1.21 times (faster)",
        "Phase 2 writes 33 tokens after 32 of the held-out test split, greedily",
        "the median of 3 rounds",
    ):
        assert said in text
    assert "undefined" not in text
    assert "[object" not in text
    assert "NaN" not in text
    ways = [row.text.split("\n") for row in browser.find_elements("css selector", "#decoding tbody tr")]
    four = ["full", "routed,", "exact,", "exact,"]
    assert [row[0].split(" ")[0] for row in ways] == ["One", *four, "8", *four]
    assert ways[3][1].startswith("went on in full")
    assert ways[8][1].startswith("drafted at exit 3")
    # Keys choose what a chart and a table show, and walk a chart's points.
    browser.find_element("css selector", "#curves input[value=flops]").send_keys("\ue014")
    settled(browser, "document.querySelector('#curves .plot svg')?.textContent.includes('seconds of training')")
    browser.find_element("css selector", "#lines input[value=test]").send_keys("\ue014")
    assert "37.50" in browser.find_element("id", "lines").text
    browser.find_element("css selector", "#compute .plot svg").send_keys("\ue014")
    tip = browser.find_element("id", "tip")
    assert tip.is_displayed()
    assert "phase 2, thresholds swept" in tip.text
    assert "threshold 0.00" in tip.text
    assert complaints(browser) == []


def test_browser_steps_through_routed_runs(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    run = run_folder(tmp_path / "run", synthetic_summary(), synthetic_explorer())
    visit(browser, write_report([run], tmp_path / "report.html"))

    def seen() -> tuple[str, str, list[str | None], list[str]]:
        slide = browser.find_element("css selector", ".slide output").text
        totals = browser.find_element("css selector", ".explorer .cards").text
        tokens = browser.execute_script(
            """return [...document.querySelectorAll(".token")].map(
                (token) => [token.dataset.exit, getComputedStyle(token).getPropertyValue("--c").trim()])"""
        )
        return slide, totals, [exit for exit, _ in tokens], [colour for _, colour in tokens]

    explorer = synthetic_explorer()
    computed = {each["thresholds"][0]: each for each in explorer["runs"]}
    slide, totals, exits, colours = seen()
    assert slide == "threshold 0.50 run 3 of 5"
    assert exits == [str(exit) for exit in computed[0.5]["exits"]]
    assert len(set(colours)) == 2

    browser.find_element("css selector", "input[type=range]").send_keys("\ue014")
    after, totals_after, exits_after, colours_after = seen()
    assert after == "threshold 0.70 run 4 of 5"
    assert totals_after != totals
    assert "41.60" in totals_after
    assert exits_after == [str(exit) for exit in computed[0.7]["exits"]]
    assert colours_after != colours

    tokens = browser.find_elements("css selector", ".token")
    tip = browser.find_element("id", "tip")
    ActionChains(browser).move_to_element(tokens[3]).perform()
    assert tip.is_displayed()
    assert f"left at exit {computed[0.7]['exits'][3]}" in tip.text
    assert f"{computed[0.7]['confidences'][3]:.3f}" in tip.text
    assert "self" in tip.text
    assert "0.500" in tip.text
    ActionChains(browser).move_to_element(browser.find_element("css selector", ".slide output")).perform()
    assert not tip.is_displayed()
    # Arrow keys walk the tokens, and Escape puts the tooltip away.
    browser.execute_script("arguments[0].focus()", tokens[0])
    tokens[0].send_keys("\ue014")
    assert browser.switch_to.active_element == tokens[1]
    assert tip.is_displayed()
    assert "␣area" in tip.text
    tokens[1].send_keys("\ue00c")
    assert not tip.is_displayed()
    # The text reads as it was: spaces, tabs and line ends are all there.
    text = browser.execute_script("return document.querySelector('.text').textContent")
    assert text.replace("⏎", "").replace("⇥", "") == "".join(explorer["tokens"])
    assert complaints(browser) == []


def test_browser_shows_hostile_text_as_text(browser: Any, tmp_path: Path) -> None:
    hostile = "</script><b class=injected>x</b><img src=x onerror=alert(1)>"
    summary = synthetic_summary(name=hostile, note=hostile, strategy=hostile)
    summary["lines"][2]["name"] = hostile
    run = run_folder(tmp_path / "run", summary, synthetic_explorer([hostile, "\x00", "\r\n", "", "end"]))
    visit(browser, write_report([run], tmp_path / "report.html"))
    assert hostile in browser.find_element("css selector", ".token").text
    assert browser.find_element("tag name", "h1").text == hostile
    assert browser.title == hostile
    assert browser.find_elements("css selector", ".injected, main img") == []
    assert complaints(browser) == []


def test_browser_says_what_a_bare_run_lacks(browser: Any, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "bare", {"format": 1, "lines": [{"name": "standard"}]})
    visit(browser, write_report([run], tmp_path / "report.html"))
    text = browser.find_element("tag name", "main").text
    for said in (
        "No figures were recorded.",
        "No line of this run was scored.",
        "This run recorded no curve.",
        "This run measured no exit on its own.",
        "no threshold sweep",
        "no reliability",
        "This run did not time decoding",
        "no explorer.json",
    ):
        assert said in text
    assert complaints(browser) == []


def test_browser_compares_runs(browser: Any, tmp_path: Path) -> None:
    other = synthetic_summary(
        name="other", in_sample=None, sweep=None, plain=None, reliability=None, data={"hash": "beef"}
    )
    runs = [
        run_folder(tmp_path / "one", synthetic_summary(), synthetic_explorer()),
        run_folder(tmp_path / "two", with_line(other, "phase 2", ppl=60.0, exit_shares=None)),
    ]
    visit(browser, write_report(runs, tmp_path / "report.html"))
    settled(browser, "document.querySelectorAll('#compute .plot svg').length === 1")
    text = browser.find_element("tag name", "main").text
    assert "2 runs compared" in text
    assert "different data" in text
    assert "± mixed" in text
    assert len(browser.find_elements("css selector", "#lines tbody tr")) == 2 + 8
    # A run's own sections open on request and are drawn then.
    browser.find_element("css selector", "details.run > summary").click()
    settled(browser, "document.querySelectorAll('details.run[open] .plot svg').length === 4")
    assert complaints(browser) == []


def test_browser_fits_a_phone(browser: Any, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", synthetic_summary(), synthetic_explorer())
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        visit(browser, write_report([run], tmp_path / "report.html"))
        settled(browser, "document.querySelectorAll('.plot svg').length === 4")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
