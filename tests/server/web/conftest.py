"""A real browser: Debian's Chromium, driven by Playwright. Where there is none these tests are skipped."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio

from tests.server.api.conftest import host, surface  # noqa: F401  fixtures

CHROMIUM = shutil.which("chromium")
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-quic")  # fmt: skip
PATIENCE_MS = 60_000  # a busy machine must not fail a test


@dataclass
class Visit:
    """A page that is open, and what went on behind it."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)

    def bodies(self, path: str) -> list[dict[str, Any]]:
        """What was posted to `path`."""
        sent = [one for one in self.requests if one.url.endswith(path) and one.method == "POST"]
        return [one.post_data_json for one in sent]

    async def say(self, text: str, *, label: str = "Message") -> None:
        box = self.page.locator(f"textarea[aria-label='{label}']:visible")
        await box.fill(text)
        await self.page.locator("form.prompt:visible button[type=submit]").click()

    async def until_answered(self) -> None:
        """Wait until no answer is on its way any more. By asking: the page's policy lets nothing wait inside it."""
        await self.page.locator("article.answer:visible").last.wait_for()
        async with asyncio.timeout(PATIENCE_MS / 1000):
            while await self.page.locator(".answer.is-live").count():
                await asyncio.sleep(0.05)


Open = Callable[..., Awaitable[Visit]]


@pytest_asyncio.fixture
async def visit() -> AsyncIterator[Open]:
    """visit(url, width=..., ...): opens it in a fresh profile. Fails the test afterwards if the page broke a rule of
    its policy, threw, or asked any other host."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.async_api", reason="needs playwright")
    visits: list[Visit] = []
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)

        async def go(url: str, *, width: int = 1280, height: int = 900, **context: Any) -> Visit:
            profile = await browser.new_context(viewport={"width": width, "height": height}, **context)
            profile.set_default_timeout(PATIENCE_MS)
            made = Visit(await profile.new_page())
            made.page.on("pageerror", lambda error: made.errors.append(str(error)))
            made.page.on(
                "console", lambda line: made.errors.append(line.text) if "Content Security" in line.text else None
            )
            made.page.on("dialog", lambda dialog: made.errors.append(f"dialog: {dialog.message}"))
            made.page.on("request", lambda request: made.requests.append(request))
            visits.append(made)
            await made.page.goto(url)
            return made

        yield go
        await browser.close()
    for made in visits:
        assert made.errors == []
        origin = made.requests[0].url.split("/", 3)[:3]
        away = [one.url for one in made.requests if one.url.split("/", 3)[:3] != origin]
        assert [url for url in away if not url.startswith(("data:", "blob:"))] == []
