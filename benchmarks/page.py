"""What it costs a browser to scroll an answer of 4,000 tokens: frames per second, and CPU time per frame.

    python -m benchmarks.page                       # the page as it is
    python -m benchmarks.page --against HEAD~1      # and as it was, in turns

A scripted ensemble of two members says the tokens at once, each with both members' views. A headless Chromium scrolls
the page from top to bottom in 240 steps, one per animation frame. Frames per second depend on what else the machine
does; the CPU time of the page's main thread per frame (of all its tasks, as the browser's trace has it) hardly does.
Needs Chromium and `pip install playwright`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import shutil
import statistics
import subprocess
from typing import Any

from ensemble_server.server.api.app import create_app
from ensemble_server.server.api.serve import listening
from ensemble_server.server.engines.scripted_hosting import ScriptedHosting
from ensemble_server.server.metrics import Metrics
from tests.server.web.two_minds import TwoMinds

NUM_TOKENS = 4000
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
SCROLL = """async () => {
  const times = [];
  for (let step = 0; step < 240; step += 1) {
    times.push(await new Promise(requestAnimationFrame));
    scrollTo(0, (document.documentElement.scrollHeight - innerHeight) * (step / 239));
  }
  return times;
}"""


async def measured(browser: Any, url: str, revision: str | None) -> str:
    """One visit, in words. `revision`: whose files of the page are shown; None for those of this tree."""
    context = await browser.new_context(viewport={"width": 1280, "height": 700})
    page = await context.new_page()
    page.set_default_timeout(120_000)
    if revision is not None:
        await page.route("**/ui/**", lambda route: _as_it_was(route, revision))
    await page.goto(url)
    await page.locator("textarea[aria-label='Message']:visible").fill("Go on")
    await page.locator("form.prompt:visible button[type=submit]").click()
    while await page.evaluate("document.querySelectorAll('.tokens [data-index]').length") < NUM_TOKENS:
        await asyncio.sleep(0.2)
    while await page.locator(".answer.is-live").count():
        await asyncio.sleep(0.1)
    await browser.start_tracing(page=page, categories=["toplevel", "devtools.timeline"])
    times = await page.evaluate(SCROLL)
    trace = json.loads(await browser.stop_tracing())
    await context.close()
    frames = [after - before for before, after in itertools.pairwise(times)]
    return (
        f"{1000 * len(frames) / sum(frames):.0f} frames a second, "
        f"slowest of 100 {statistics.quantiles(frames, n=100)[-1]:.0f} ms, "
        f"main thread {main_thread_ms(trace) / len(frames):.1f} ms CPU a frame"
    )


async def _as_it_was(route: Any, revision: str) -> None:
    name = route.request.url.split("/ui/")[1].partition("?")[0]
    shown = subprocess.run(["git", "show", f"{revision}:server/web/{name}"], capture_output=True)
    kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}[name.rpartition(".")[2]]
    await route.fulfill(body=shown.stdout, content_type=kind)


def main_thread_ms(trace: dict[str, Any]) -> float:
    """The CPU time of all tasks of the page's main thread."""
    events = trace["traceEvents"]
    named = {(one["pid"], one["tid"]): one["args"]["name"] for one in events if one["name"] == "thread_name"}
    main = {thread for thread, name in named.items() if name == "CrRendererMain"}
    tasks = (one for one in events if one["name"].endswith("RunTask") and (one["pid"], one["tid"]) in main)
    return sum(one.get("tdur", 0) for one in tasks) / 1000


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REVISION", help="a commit whose page is measured in turns with this one")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    from playwright.async_api import async_playwright

    two = TwoMinds(tuple(f" word{place % 97}" for place in range(NUM_TOKENS)), pace=50)
    hosting = ScriptedHosting({"two": two})
    app = create_app(hosting, metrics=Metrics())
    free_port = hosting.config.server.model_copy(update={"port": 0})
    pages: dict[str, str | None] = {"this tree": None}
    if arguments.against:
        pages[arguments.against] = arguments.against
    async with listening(app, free_port) as port, async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for _ in range(arguments.repeats):
            for name, revision in pages.items():
                print(f"{name}: {await measured(browser, f'http://127.0.0.1:{port}', revision)}", flush=True)
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
