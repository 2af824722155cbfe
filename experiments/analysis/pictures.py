"""Pictures of the README, from a run of the demo: `python -m experiments.analysis.pictures runs/demo`.

- `docs/report.png`: the head of the report, with verdict, lines and curves.
- `docs/explorer.gif`: the exit explorer at several thresholds.
- `docs/report.json`: what the run printed. Each picture carries the digest of this file, so that a test can tell
  whether README and pictures show the same run.

Screenshots are made by Chromium or Chrome.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path
from typing import Any

from ease.errors import EaseError
from ease.report.formats import format_ppl
from ease.report.tables import text_table
from ease.report.verdict import verdict

DOCS = Path(__file__).resolve().parents[2] / "docs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FRAMES = 6
"""Number of thresholds that the animation shows, from all tokens leaving early to none."""
SECONDS = 1.5
"""How long it shows each of them."""

# Parts of the report that a picture leaves out.
REPORT = "nav, footer, details, .part:not(#lines, #curves), #curves h4, #curves h4 ~ * { display: none }"
EXPLORER = """
header, nav, footer, details, .note, .part:not(#explorer), #explorer > h2 { display: none }
main { padding: 1rem }
#explorer#explorer { padding: 0; margin: 0; border: 0 }
.explorer .cards { grid-template-columns: 2fr 1.3fr repeat(3, 1fr) }
.wide { grid-column: auto }
.text { max-height: none; overflow: visible }
* { transition: none !important }
"""
SLIDE = """
const slider = document.querySelector("#explorer input[type=range]");
slider.value = Math.round(slider.max * POSITION);
slider.dispatchEvent(new Event("input"));
"""


def printed(summary: dict[str, Any]) -> dict[str, Any]:
    """What a run prints on a terminal of 80 columns, and its perplexities."""
    from rich.console import Console

    page = StringIO()
    console = Console(file=page, width=80, highlight=False, color_system=None)
    console.print(text_table(summary))
    judged = verdict(summary)
    console.print(f"{judged.headline}\n{judged.detail}", markup=False)
    machine = summary.get("machine") or {}
    return {
        "run": summary["name"],
        "text": summary["data"]["name"],
        "seed": summary["seed"],
        "torch": machine.get("torch"),
        "perplexity": {line["name"]: format_ppl(line["test"]["ppl"]) for line in summary["lines"]},
        "verdict": judged.headline,
        "output": [line.rstrip() for line in page.getvalue().splitlines()],
    }


def digest(record: dict[str, Any]) -> str:
    """A digest of what `printed` returns."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def screenshot(browser: str, report: Path, style: str, script: str, width: int, height: int, scale: float) -> Any:
    """The report with an additional style sheet and script, as an image without empty space below."""
    from PIL import Image, ImageChops

    page = report.read_text(encoding="utf-8")
    end = page.rindex("</body>")
    with tempfile.TemporaryDirectory() as folder:
        changed, picture = Path(folder, "page.html"), Path(folder, "page.png")
        extra = f"<style>{style}</style><script>{script}</script>"
        changed.write_text(page[:end] + extra + page[end:], encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--virtual-time-budget=5000", f"--force-device-scale-factor={scale}"]
        command += [f"--window-size={width},{height}", f"--screenshot={picture}", changed.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not picture.exists():
            raise EaseError(f"{browser} made no screenshot: {done.stderr[-500:]}")
        image = Image.open(picture).convert("RGB")
    paper = Image.new("RGB", image.size, image.getpixel((0, 0)))
    drawn = ImageChops.difference(image, paper).getbbox() or (0, 0, *image.size)
    return image.crop((0, 0, image.width, min(image.height, drawn[3] + round(16 * scale))))


def main(run: Path, docs: Path = DOCS, frames: int = FRAMES) -> None:
    """Write the pictures and the record of a run.

    Args:
        run: folder of the run.
        docs: folder to write to.
        frames: number of thresholds that the animation shows, at least two.

    Raises:
        EaseError: there is no browser, or it fails.
    """
    from PIL.PngImagePlugin import PngInfo

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise EaseError("the pictures need Chromium: apt-get install --no-install-recommends chromium")
    record = printed(json.loads((run / "summary.json").read_text(encoding="utf-8")))
    mark, report = digest(record), run / "report.html"

    info = PngInfo()
    info.add_text("demo", mark)
    image = screenshot(browser, report, REPORT, "", 1200, 2400, 1)
    image.quantize(128).save(docs / "report.png", pnginfo=info, optimize=True)

    scripts = [SLIDE.replace("POSITION", str(i / (frames - 1))) for i in range(frames)]
    images = [screenshot(browser, report, EXPLORER, script, 840, 1400, 1.5).quantize(64) for script in scripts]
    images[0].save(
        docs / "explorer.gif",
        save_all=True,
        append_images=[*images[1:], *images[-2:0:-1]],  # back to the first one, so that the loop has no jump
        duration=round(1000 * SECONDS),
        loop=0,
        comment=mark.encode(),
    )
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (docs / "report.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except EaseError as error:
        sys.exit(str(error))
