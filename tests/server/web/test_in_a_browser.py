"""The page in a real browser, over scripted models. Every test also fails if a rule of the page's policy is broken, a
script throws, or another host is asked (see `visit`)."""

from __future__ import annotations

import json
import math

import pytest

from ensemble_server.ensembles.crowd_vote import CrowdVote
from ensemble_server.ensembles.exchange_of_thought import ExchangeOfThought
from ensemble_server.ensembles.method import Services
from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel
from tests.server.api.conftest import live_server, until
from tests.server.web.two_minds import WEIGHTS, TwoMinds, mixed, views

pytestmark = pytest.mark.slow

WORDS = ("The", " capital", " of", " France", " is", " Paris", ".")
HOSTILE = (
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(2)">',
    "\n\n[link](javascript:alert(3)) ![pixel](https://evil.example/p.png)",
    "\n```\n</code></pre><svg onload=alert(4)>\n```\n",
    "\u202e\u0000 {{7*7}} ${alert(5)} **<b onmouseover=alert(6)>bold</b>**",
)


async def test_an_answer_streams_in_token_by_token_and_is_coloured_by_its_driver(host, visit):
    two = TwoMinds(WORDS)
    async with live_server(host(two=two)) as url:
        seen = await visit(url)
        await seen.say("What is the capital of France?")
        await seen.until_answered()
        spans = seen.page.locator(".tokens > span")
        assert await spans.all_text_contents() == list(WORDS)
        for place in range(len(WORDS)):
            parts = {name: WEIGHTS[name] * p for name, p in views(place).items()}
            driver = max(parts, key=parts.__getitem__)
            assert f"member{list(WEIGHTS).index(driver)}" in await spans.nth(place).get_attribute("class")


async def test_what_a_token_shows_equals_what_the_api_says(host, visit):
    async with live_server(host(two=TwoMinds(WORDS))) as url:
        seen = await visit(url)
        await seen.say("Hello")
        await seen.until_answered()
        await seen.page.locator(".tokens > span").nth(3).hover()
        card = seen.page.locator(".card")
        assert await card.locator(".facts [data-value=p]").text_content() == f"{100 * mixed(3):.1f} %"
        assert await card.locator("[data-value=entropy]").text_content() == "1.250 nats"
        assert await card.locator("[data-value=disagreement]").text_content() == "0.1250 nats"
        for name, p in views(3).items():
            row = card.locator(f"tr[data-member={name}]")
            assert await row.locator("[data-value=p]").text_content() == f"{100 * p:.1f} %"
            assert await row.locator("[data-value=weight]").text_content() == f"{WEIGHTS[name]:.3f}"
            share = 100 * WEIGHTS[name] * p / mixed(3)
            assert (await row.locator("[data-value=share]").text_content()).strip() == f"{share:.1f} %"


async def test_the_keyboard_walks_over_tokens_and_closes_the_card(host, visit):
    async with live_server(host(two=TwoMinds(WORDS))) as url:
        seen = await visit(url)
        await seen.say("Hello")
        await seen.until_answered()
        page = seen.page
        assert await page.locator(".tokens > span[tabindex='0']").count() == 1
        await page.locator(".tokens > span").first.focus()
        for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 6), ("Home", 0)):
            await page.keyboard.press(key)
            assert await page.evaluate("Number(document.activeElement.dataset.index)") == place
        await page.keyboard.press("Enter")
        await page.locator(".card button[aria-label='Close the card']").wait_for()
        await page.keyboard.press("Escape")
        await page.locator(".card").wait_for(state="detached")


async def test_stop_ends_the_answer_on_the_server(host, visit):
    two = TwoMinds(WORDS * 1000, delay_s=0.02)
    async with live_server(host(two=two)) as url:
        seen = await visit(url)
        await seen.say("Go on for ever")
        await seen.page.locator(".tokens > span").nth(5).wait_for()
        assert two.num_live == 1
        await seen.page.locator("button.stop").click()
        await until(lambda: two.num_live == 0, timeout_s=30)
        await seen.page.locator("text=stopped").wait_for()
        assert await seen.page.locator(".tokens > span").count() < len(two.pieces)


async def test_a_slider_arrives_in_the_next_request_and_not_before(host, visit):
    two = TwoMinds(WORDS)
    async with live_server(host(two=two)) as url:
        seen = await visit(url)
        slider = seen.page.locator("input[type=range][aria-label=left]")
        await slider.focus()
        for _ in range(5):
            await seen.page.keyboard.press("ArrowRight")
        assert two.requests == []
        await seen.say("Hello")
        await seen.until_answered()
    [body] = seen.bodies("/v1/chat/completions")
    assert body["ensemble"]["weights"] == {"left": 0.5, "right": 0.75}
    assert body["ensemble"]["explain"] == {"top": 5}
    assert "pool" not in body["ensemble"]
    assert two.requests[0].overrides["weights"] == {"left": 0.5, "right": 0.75}


async def test_rerunning_puts_a_second_answer_beside_the_first(host, visit):
    async with live_server(host(two=TwoMinds(WORDS))) as url:
        seen = await visit(url)
        await seen.say("Hello")
        await seen.until_answered()
        await seen.page.locator("button:has-text('Rerun with these')").click()
        await seen.page.locator(".columns .answer").nth(1).wait_for()
        await seen.until_answered()
        assert await seen.page.locator(".columns .answer").count() == 2
    first, second = seen.bodies("/v1/chat/completions")
    assert first == second


async def test_another_token_begins_a_branch(host, visit):
    two = TwoMinds(WORDS)
    async with live_server(host(two=two)) as url:
        seen = await visit(url)
        await seen.say("Hello")
        await seen.until_answered()
        await seen.page.locator(".tokens > span").nth(2).click()
        await seen.page.locator(".alternatives button").first.click()
        await seen.page.locator(".columns .answer").nth(1).wait_for()
        await seen.until_answered()
        texts = await seen.page.locator(".columns .answer").nth(1).locator(".tokens > span").all_text_contents()
    assert texts == ["The", " capital", " other0", *WORDS]
    [body] = seen.bodies("/v1/completions")
    assert body["prompt"] == [1, 2, 3, 0, 1, 300]  # the prompt's ids, two that were kept, and the one that was chosen


async def test_editing_a_question_keeps_the_earlier_version(host, visit):
    async with live_server(host(two=TwoMinds(WORDS))) as url:
        seen = await visit(url)
        await seen.say("First")
        await seen.until_answered()
        page = seen.page
        await page.locator("button:has-text('Edit')").click()
        await page.locator("textarea[aria-label='Edited message']").fill("Second")
        await page.keyboard.press("Enter")
        await page.locator("text=2/2").wait_for()
        await seen.until_answered()
        assert await page.locator(".said").text_content() == "Second"
        await page.locator("button[aria-label='Earlier version']").first.click()
        assert await page.locator(".said").text_content() == "First"
        await page.reload()
        assert await page.locator(".conversations option", has_text="First").count() == 1  # kept in this browser
    assert [body["messages"][-1]["content"] for body in seen.bodies("/v1/chat/completions")] == ["First", "Second"]


async def test_hostile_text_stays_text(host, visit):
    models = {"two": TwoMinds(HOSTILE), "plain": Script(HOSTILE)}
    async with live_server(host(**models)) as url:
        seen = await visit(url)
        page = seen.page
        before = await page.evaluate("document.scripts.length")
        await seen.say("".join(HOSTILE))
        await seen.until_answered()
        await page.locator(".reading select").select_option("text")
        await page.locator(".tokens").wait_for(state="detached")
        alive = ".turns a, .turns b, .turns svg, .turns iframe, .turns img"
        found = await page.evaluate(
            "alive => [document.scripts.length, document.images.length, document.querySelectorAll(alive).length]", alive
        )
        assert found == [before, 0, 0]
        assert "<script>alert(1)</script>" in await page.locator(".answer .prose").text_content()


async def test_a_server_with_keys_asks_for_one_and_keeps_it_out_of_addresses(host, visit):
    async with live_server(host({"api_keys": ("right-key",)}, two=TwoMinds(WORDS))) as url:
        seen = await visit(url)
        page = seen.page
        for key in ("wrong-key", "right-key"):
            await page.locator("dialog input[type=password]").fill(key)
            await page.locator("dialog button[type=submit]").click()
        await page.locator(".picker select").wait_for()
        await seen.say("Hello")
        await seen.until_answered()
        assert await page.evaluate("[sessionStorage.length, JSON.stringify(localStorage).includes('right-key')]") == [
            1,
            False,
        ]
    assert all("key" not in request.url.partition("?")[2] for request in seen.requests)
    assert not any("right-key" in request.url for request in seen.requests)


async def test_a_deep_link_fills_in_and_sends_nothing(host, visit):
    models = {name: TwoMinds(WORDS, name=name) for name in ("a", "b", "c")}
    async with live_server(host(**models)) as url:
        seen = await visit(f"{url}/#compare=c,a,nobody&prompt=Hello%20%3Cb%3E")
        page = seen.page
        await page.locator("fieldset.choices").wait_for()
        assert await page.locator("textarea:visible").input_value() == "Hello <b>"
        assert await page.locator(".choices input:checked").count() == 2
        assert seen.bodies("/v1/chat/completions") == []
        await page.locator("form.prompt:visible button[type=submit]").click()
        await page.locator(".side-by-side .answer").nth(1).wait_for()
        await seen.until_answered()
    sent = seen.bodies("/v1/chat/completions")
    assert [body["model"] for body in sent] == ["c", "a"]
    assert {body["seed"] for body in sent} == {1}


async def test_a_blind_comparison_names_nobody_until_it_is_judged(host, visit):
    models = {name: TwoMinds(WORDS, name=name) for name in ("alpha", "beta")}
    async with live_server(host(**models)) as url:
        seen = await visit(f"{url}/#compare=alpha,beta&prompt=Hello")
        page = seen.page
        await page.locator("label:has-text('blind') input").check()
        await page.locator("form.prompt:visible button[type=submit]").click()
        await page.locator("[aria-label='Which is best?'] button").first.wait_for()
        assert await page.locator(".side-by-side h3").all_text_contents() == ["A", "B"]
        await page.locator("[aria-label='Which is best?'] button").first.click()
        titles = await page.locator(".side-by-side h3").all_text_contents()
        assert {title.removesuffix(" ★") for title in titles} == {"alpha", "beta"}
        tally = json.loads(await page.evaluate("localStorage.getItem('ensemble.tally')"))
    assert sum(one["won"] for one in tally.values()) == 1


def scripted(**texts):
    return {name: ScriptedModel(name, Script((text,))) for name, text in texts.items()}


async def test_the_cells_of_a_vote_are_its_traces(host, visit):
    members = scripted(a="the cat sat on the mat", b="the cat sat on a mat", c="dogs bark at night")
    config = CrowdVote.Config(method="crowd_vote", members=list(members))
    async with live_server(host(crowd=CrowdVote("crowd", config, members, Services()))) as url:
        seen = await visit(f"{url}/#vote")
        await seen.say("What?", label="Question")
        await seen.until_answered()
        page = seen.page
        async with page.expect_download() as download:
            await page.locator("button:has-text('Download the trace')").click()
        trace = json.loads((await (await download.value).path()).read_text())
        for i, row in enumerate(trace["matrix"]):
            for j, value in enumerate(row):
                if i != j:
                    assert await page.locator(f"[data-cell='{i},{j}']").text_content() == f"{value:.2f}"
        for index, score in enumerate(trace["scores"]):
            assert await page.locator(f"[data-score='{index}']").text_content() == f"{score:.3f}"
        assert "★" in await page.locator(".candidates li").nth(trace["winner"]).text_content()
        await page.locator("[data-cell='0,1']").click()
        assert await page.locator(".diff mark").all_text_contents() == ["the", "a"]


async def test_an_exchange_shows_its_rounds_and_downloads_what_replay_reads(host, visit, tmp_path):
    from typer.testing import CliRunner

    from ensemble_server.server.cli.app import app

    members = scripted(a="The answer is 4.", b="The answer is 4.", c="The answer is 5.")
    config = ExchangeOfThought.Config(
        method="exchange_of_thought", members=list(members), topology="relay", max_rounds=2, answer="number"
    )
    async with live_server(host(talk=ExchangeOfThought("talk", config, members, Services()))) as url:
        seen = await visit(f"{url}/#exchange")
        await seen.say("2 + 2?", label="Question")
        await seen.until_answered()
        page = seen.page
        async with page.expect_download() as download:
            await page.locator("button:has-text('Download the trace')").click()
        saved = tmp_path / "trace.json"
        await (await download.value).save_as(saved)
        transcript = json.loads(saved.read_text())
        rows = page.locator(".rounds tbody tr:not(.arrows)")
        assert await rows.count() == len(transcript["rounds"]) > 1
        for number, (spoken, state) in enumerate(zip(transcript["rounds"], transcript["states"], strict=True)):
            for name, reply in spoken["replies"].items():
                assert await rows.nth(number).locator(f"[data-answer={name}]").text_content() == reply["answer"]
                shown = await rows.nth(number).locator(f"[data-confidence={name}]").text_content()
                assert shown == f"confidence {state['confidence'][name]:.2f}"
        assert await page.locator(".arrow").count() == 3 * (len(transcript["rounds"]) - 1)  # a relay: each hears one
    assert CliRunner().invoke(app, ["replay", str(saved)]).exit_code == 0


async def test_the_trajectory_and_its_table_have_each_tokens_weights(host, visit):
    async with live_server(host(two=TwoMinds(WORDS))) as url:
        seen = await visit(url)
        await seen.say("Hello")
        await seen.until_answered()
        page = seen.page
        await page.locator("summary:has-text('Trajectory')").click()
        await page.locator(".trajectory canvas").wait_for()
        await page.locator(".trajectory select").select_option("weight")
        await page.locator(".trajectory summary").click()
        rows = page.locator(".trajectory tbody tr:has(td)")
        cells = await page.locator(".twin tbody tr").nth(2).locator("th, td").all_text_contents()
        assert cells == ["3", "␣of", "0.2500", "0.7500"]
        assert await rows.count() >= len(WORDS)
        async with page.expect_download() as download:
            await page.locator(".trajectory button:has-text('CSV')").click()
        lines = (await (await download.value).path()).read_text().splitlines()
    assert len(lines) == 1 + len(WORDS)
    values = lines[3].split(",")
    assert float(values[2]) == pytest.approx(math.log(mixed(2)))


async def test_batches_are_sent_followed_and_fetched(host, visit, tmp_path):
    rows = tmp_path / "rows.jsonl"
    body = {"model": "two", "messages": [{"role": "user", "content": "Hello"}]}
    rows.write_text(
        json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}) + "\n"
    )
    async with live_server(host(two=TwoMinds(WORDS))) as url:
        seen = await visit(f"{url}/#batches")
        page = seen.page
        await page.locator("text=There are no batches yet.").wait_for()
        await page.locator("input[type=file]:visible").set_input_files(rows)
        await page.locator("button:has-text('Start a batch')").click()
        await page.locator("td:has-text('completed')").wait_for()
        async with page.expect_download() as download:
            await page.locator("button:has-text('Answers')").click()
        line = json.loads((await (await download.value).path()).read_text())
    assert line["response"]["body"]["choices"][0]["message"]["content"] == "".join(WORDS)


async def test_the_servers_state_is_what_its_metrics_say(host, visit):
    hosting = host(two=TwoMinds(WORDS), one=Script(("a",)))
    async with live_server(hosting) as url:
        seen = await visit(url)
        await seen.say("Hello")
        await seen.until_answered()
        hosting.down = frozenset({"one"})
        await seen.page.goto(f"{url}/#server")
        page = seen.page
        await page.locator("text=degraded").wait_for()
        row = page.locator(".server tbody tr", has_text="two").first
        await row.locator("td", has_text=str(len(WORDS))).wait_for()
        assert await page.locator(".server tbody tr", has_text="one").first.locator("td").first.text_content() == "down"


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_every_view_fits_a_small_phone(host, visit, scheme):
    members = scripted(a="the cat sat on the mat", b="a dog")
    vote = CrowdVote("crowd", CrowdVote.Config(method="crowd_vote", members=list(members)), members, Services())
    async with live_server(host(two=TwoMinds(("An", " uncommonly", " long", " word" * 30)), crowd=vote)) as url:
        seen = await visit(url, width=320, color_scheme=scheme)
        await seen.say("x" * 200)
        await seen.until_answered()
        for view in ("chat", "text", "compare", "vote", "exchange", "batches", "server"):
            await seen.page.goto(f"{url}/#{view}")
            await seen.page.locator(f".rail a[aria-current][href='#{view}']").wait_for()
            assert await seen.page.evaluate("document.documentElement.scrollWidth") <= 320, view


async def test_screen_readers_hear_sentences(host, visit):
    pieces = ("It", " is", " so", ".", " And", " more", " so", ".")
    async with live_server(host(two=TwoMinds(pieces, delay_s=0.01))) as url:
        seen = await visit(url)
        await seen.say("Hello")
        await seen.until_answered()
        heard = await seen.page.locator("#announcements p").all_text_contents()
    assert [line.strip() for line in heard] == ["It is so.", "And more so."]


async def test_the_api_description_works_without_internet(host, visit):
    async with live_server(host()) as url:
        seen = await visit(f"{url}/docs")
        await seen.page.locator(".opblock-summary-path").first.wait_for()
        assert "/v1/chat/completions" in await seen.page.locator("#swagger-ui").inner_text()


async def test_thousands_of_tokens_scroll_smoothly(host, visit):
    two = TwoMinds(tuple(f" word{place % 97}" for place in range(4000)), pace=50)
    async with live_server(host(two=two)) as url:
        seen = await visit(url, height=700)
        await seen.say("Go on")
        await seen.page.locator(".tokens > span").nth(3999).wait_for()
        await seen.until_answered()
        frames, seconds = await seen.page.evaluate(SCROLL)
    print(f"4,000 tokens: {frames / seconds:.0f} frames a second")
    assert frames > 0  # how many is in the report of the run: a busy machine must not fail a test


SCROLL = """async () => {
  const began = performance.now();
  let frames = 0;
  for (let step = 0; step < 120; step += 1) {
    await new Promise(requestAnimationFrame);
    scrollTo(0, (document.documentElement.scrollHeight - innerHeight) * (step / 119));
    frames += 1;
  }
  return [frames, (performance.now() - began) / 1000];
}"""
