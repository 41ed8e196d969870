"""What axe-core finds in every view. It comes from npm for this test only; where npm or the network is missing the test
is skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ensemble_server.ensembles.crowd_vote import CrowdVote
from ensemble_server.ensembles.method import Services
from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel
from tests.server.api.conftest import live_server
from tests.server.web.two_minds import TwoMinds

pytestmark = pytest.mark.slow

AXE = "axe-core@4.14.1"
NPM = shutil.which("npm")


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of axe-core."""
    if NPM is None:
        pytest.skip("needs npm for axe-core")
    folder = tmp_path_factory.mktemp("axe")
    command = [NPM, "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", AXE]
    fetched = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=os.environ)
    if fetched.returncode:
        pytest.skip(f"npm cannot fetch {AXE}: {fetched.stderr[-200:]}")
    return Path(folder, "node_modules", "axe-core", "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_nothing_serious_is_found_in_any_view(host, visit, axe, scheme):
    members = {name: ScriptedModel(name, Script((text,))) for name, text in (("a", "the cat sat"), ("b", "a cat sat"))}
    vote = CrowdVote("crowd", CrowdVote.Config(method="crowd_vote", members=list(members)), members, Services())
    two = TwoMinds(("The", " capital", "\n", " of", " France", ".") * 5)
    async with live_server(host(two=two, crowd=vote)) as url:
        seen = await visit(url, color_scheme=scheme)
        page = seen.page
        await seen.say("What is the capital of France?")
        await seen.until_answered()
        await page.locator("summary:has-text('Trajectory')").click()
        await page.locator(".trajectory summary").click()
        await page.locator(".tokens > span").nth(1).click()
        found = await serious(page, axe)
        for view in ("text", "compare", "vote", "exchange", "batches", "server"):
            await page.goto(f"{url}/#{view}")
            await page.locator(f".rail a[aria-current][href='#{view}']").wait_for()
            if view == "vote":
                await seen.say("What?", label="Question")
                await page.locator(".heatmap:visible").wait_for()
            found += [f"{view}: {line}" for line in await serious(page, axe)]
    assert found == []


async def serious(page, axe: str) -> list[str]:
    """Runs in the page by the debugger's door, which its policy does not guard."""
    await page.evaluate(f"() => {{ {axe} }}")
    results = await page.evaluate("async () => (await axe.run(document)).violations")
    return [
        f"{found['id']}: {node['html'][:200]} {node['failureSummary'][:300]}"
        for found in results
        if found["impact"] in {"serious", "critical"}
        for node in found["nodes"][:5]
    ]
