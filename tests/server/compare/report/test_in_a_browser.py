"""The page in a real browser: it fits a phone, and nothing that a model wrote comes to life."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from ensemble_server.server.compare.report import write_report
from tests.server.compare.report.sample import sample

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)"),
]
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-quic", "--hide-scrollbars")  # fmt: skip
MEASURE = """
<script>addEventListener("load", () => {
  document.querySelectorAll("details").forEach(element => element.open = true);
  const isOutside = element => !element.closest(".scroll") && element.getBoundingClientRect().right > innerWidth + 1;
  const outside = [...document.querySelectorAll("body *")].filter(isOutside).map(element => element.tagName);
  parent.postMessage(JSON.stringify({
    width: document.documentElement.scrollWidth, outside,
    scripts: document.scripts.length, images: document.images.length,
    ground: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector("svg text")).fill,
  }), "*");
});</script></body>"""
FRAME = """<!doctype html><iframe src="probe.html" width="{width}" height="900"></iframe>
<script>addEventListener("message", event => document.body.innerHTML = "<pre>" + event.data)</script>"""


def chromium(folder: Path, page: Path, *flags: str) -> str:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def measured(folder: Path, *flags: str, width: int = 390) -> dict:
    """What the page measures of itself in a frame of that width. Its own policy would forbid the question."""
    write_report(sample(), folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</body>", MEASURE)
    (folder / "probe.html").write_text(text, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    dom = chromium(folder, folder / "frame.html", "--virtual-time-budget=5000", "--dump-dom", *flags)
    return json.loads(unescape(dom.partition("<pre>")[2].partition("</pre>")[0]))


def test_on_a_phone_only_tables_and_figures_scroll_sideways(tmp_path: Path) -> None:
    found = measured(tmp_path)
    assert found["outside"] == []
    assert found["width"] <= 390


def test_the_only_script_is_the_one_that_asks(tmp_path: Path) -> None:
    found = measured(tmp_path)
    assert (found["scripts"], found["images"]) == (1, 0)


def test_letters_stand_out_in_the_light_and_in_the_dark(tmp_path: Path) -> None:
    def brightness(colour: str) -> float:
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    light = measured(tmp_path)
    dark = measured(tmp_path, "--blink-settings=preferredColorScheme=0")
    assert brightness(light["ground"]) - brightness(light["ink"]) > 150
    assert brightness(dark["ink"]) - brightness(dark["ground"]) > 150


def test_the_page_as_it_is_can_be_photographed(tmp_path: Path) -> None:
    write_report(sample(), tmp_path)
    chromium(tmp_path, tmp_path / "report.html", "--window-size=1200,1600", f"--screenshot={tmp_path / 'page.png'}")
    assert (tmp_path / "page.png").stat().st_size > 50_000  # an empty page of this size has about 10 kB
