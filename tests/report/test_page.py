"""The HTML report: its content, that it is a single offline file, and that it works in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_report import run_folder, synthetic_explorer, synthetic_summary, with_line

from ease.errors import EaseError
from ease.report.page import write_report


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


def test_metrics_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", with_line(synthetic_summary(), "phase 2", ppl=float("inf"), acc=float("nan")))
    figures = embedded(write_report([run], tmp_path / "report.html").read_text("utf-8"))["runs"][0]["summary"]["lines"][
        2
    ]["test"]
    assert figures["ppl"] is None
    assert figures["acc"] is None


def test_runs_of_one_name_are_labeled_by_folder(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / name, synthetic_summary()) for name in ("seed0", "seed1")]
    data = embedded(write_report(runs, tmp_path / "report.html").read_text("utf-8"))
    assert [run["label"] for run in data["runs"]] == ["synthetic (seed0)", "synthetic (seed1)"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is not a run folder: it has no summary.json."),
        ({"summary.json": b'{"format": 1, "li'}, "is damaged (Unterminated string"),
        ({"summary.json": b"\xff\xfe\x00"}, "is damaged ('utf-8' codec"),
        ({"summary.json": b"[1]"}, "is damaged (it must hold a JSON object): run it again."),
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
        (
            {
                "summary.json": b'{"format": 1, "lines": [{"name": "a", "test": {"ppl": 3}}]}',
                "SHA256SUMS": b"0123  summary.json\n",
            },
            "summary.json is damaged (its checksum is not the one in SHA256SUMS, ",
        ),
    ],
)
def test_a_damaged_run_is_reported_in_one_sentence(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(EaseError) as caught:
        write_report([tmp_path], tmp_path / "report.html")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert not (tmp_path / "report.html").exists()


def test_bad_arguments_are_reported_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(EaseError, match="No run folder was given"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(EaseError, match="is not a run folder"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    run = run_folder(tmp_path / "run", synthetic_summary())
    with pytest.raises(EaseError, match="name another file"):
        write_report([run], tmp_path)


# ---------------------------------------------------------------------------------------------------------
# In a browser


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
        "± mixed",
        "Phase 2 beats phase 1 continued overall",
        "in-sample: measured on training tokens",
        "measured on the held-out test split, 48,000 tokens",
        "Speed compared with full decoding: with 1 row, routed at 1.21 times (faster)",
        "Greedy decoding of phase 2: 33 new tokens after a prompt of 32 tokens from the held-out test split",
        "median and range of the speed over 3 rounds",
    ):
        assert said in text
    assert "undefined" not in text
    assert "[object" not in text
    assert "NaN" not in text
    ways = [row.text.split("\n") for row in browser.find_elements("css selector", "#decoding tbody tr")]
    four = ["full", "routed,", "exact,", "exact,"]
    assert [row[0].split(" ")[0] for row in ways] == ["Single", *four, "Batch", *four]
    assert ways[3][1].startswith("most tokens by lookup")
    assert ways[8][1].startswith("most tokens by exit 3")
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
    assert f"exits at layer {computed[0.7]['exits'][3]}" in tip.text
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
        "No metrics were recorded.",
        "No line of this run was scored.",
        "This run recorded no curve.",
        "This run did not score its exits separately.",
        "no threshold sweep",
        "no reliability",
        "This run did not time decoding",
        "no explorer.json",
    ):
        assert said in text
    assert complaints(browser) == []


def test_browser_compares_runs(browser: Any, tmp_path: Path) -> None:
    other = synthetic_summary(name="other", in_sample=None, sweep=None, reliability=None, data={"hash": "beef"})
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
