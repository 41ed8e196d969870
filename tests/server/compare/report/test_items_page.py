"""The page of items in a real browser: filter, sort, slices, transcripts, another baseline, CSV; and what axe finds."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from ensemble_server.server.compare.kept.pairs import Pairs
from ensemble_server.server.compare.report import write_report
from ensemble_server.server.compare.report.items_csv import write_csv
from tests.server.compare.report.items_sample import tables
from tests.server.compare.report.sample import HOSTILE, difference, sample
from tests.server.web.conftest import visit  # noqa: F401  a fixture
from tests.server.web.test_accessibility import axe, serious  # noqa: F401  a fixture

pytestmark = pytest.mark.slow


def written(folder: Path) -> str:
    """The address of the items page of a small comparison."""
    pairs = Pairs(
        num_resamples=2000,
        of={"mix": {"mean text": {"base": difference(0.075, 0.01, "worse")}, "text code": {}}},
    )
    write_report(sample(), folder, pairs=pairs, items=tables())
    return (folder / "items.html").as_uri()


async def names(page) -> list[str]:
    return await page.locator("#items tbody th").all_text_contents()


async def test_items_are_filtered_sorted_and_cut_into_slices(tmp_path, visit):  # noqa: F811
    page = (await visit(written(tmp_path))).page
    assert await names(page) == ["q1", "q2", "q3", "q10", "q4"]
    await page.locator("#items thead button", has_text="item").click()
    assert await names(page) == ["q1", "q2", "q3", "q4", "q10"]
    await page.locator("#items thead button", has_text="base").first.click()
    await page.locator("#items thead button", has_text="base").first.click()
    assert (await names(page))[:2] == ["q2", "q3"]
    assert await page.locator("#items th[aria-sort=descending]").text_content() == "base"

    await page.select_option("#show", "better")
    assert sorted(await names(page)) == ["q1", "q10"]
    assert "mix is better than base on 2 and worse on 0" in await page.locator("#count").text_content()
    await page.select_option("#show", "failed")
    assert await names(page) == ["q4"]
    await page.select_option("#show", "all")
    await page.fill("#search", "TO Q10")
    assert await names(page) == ["q10"]
    await page.fill("#search", "")

    await page.select_option("#field", "level")
    lines = [await line.locator("th, td").all_text_contents() for line in await page.locator("#means tbody tr").all()]
    assert lines == [
        ["all shown", "5", "0.400", "0.600", "0.700"],
        ["easy", "2", "0.500", "1.000", "1.000"],
        ["hard", "3", "0.333", "0.333", "0.500"],
    ]
    await page.select_option("#value", "easy")
    assert sorted(await names(page)) == ["q1", "q2"]


async def test_transcripts_stand_side_by_side_and_stay_text(tmp_path, visit):  # noqa: F811
    page = (await visit(written(tmp_path))).page
    await page.locator("#items tbody button", has_text="q10").click()
    dialog = page.locator("dialog[open]")
    assert await dialog.locator("h2").text_content() == "task sums: q10"
    assert await dialog.locator(".outputs pre").all_text_contents() == ["base says no", "mix says 42", "linear says no"]
    assert "level: hard" in await dialog.text_content()
    await page.locator("#next").click()
    assert await dialog.locator("pre").first.text_content() == HOSTILE
    assert await dialog.locator("script, img").count() == 0
    assert "error: it broke" in await dialog.text_content()
    await page.keyboard.press("ArrowLeft")
    assert await dialog.locator("h2").text_content() == "task sums: q10"
    await page.keyboard.press("Escape")
    await page.locator("dialog[open]").wait_for(state="detached")


async def test_another_baseline_turns_gains_around(tmp_path, visit):  # noqa: F811
    page = (await visit(written(tmp_path))).page
    assert (await page.locator("#items thead th").all_text_contents())[-1] == "mix over base"
    await page.select_option("#baseline", "linear")
    assert (await page.locator("#items thead th").all_text_contents())[-1] == "mix over linear"
    assert await page.locator("#items tbody tr td:last-child").all_text_contents() == [
        "0.000", "0.000", "-1.000", "1.000", "-0.500"
    ]  # fmt: skip
    await page.select_option("#measure", label="text verse")
    assert await page.locator("#items tbody tr td:last-child").all_text_contents() == ["0.100"] * 3


async def test_the_button_writes_the_csv_that_the_command_writes(tmp_path, visit):  # noqa: F811
    page = (await visit(written(tmp_path))).page
    async with page.expect_download() as waiting:
        await page.locator("#csv").click()
    await (await waiting.value).save_as(tmp_path / "page.csv")
    write_csv(tables()[:1], tmp_path / "command.csv")
    with (tmp_path / "page.csv").open(newline="") as ours, (tmp_path / "command.csv").open(newline="") as theirs:
        shown, expected = list(csv.DictReader(ours)), list(csv.DictReader(theirs))
    assert [line | {"score": float(line["score"])} for line in shown] == [
        line | {"score": float(line["score"])} for line in expected
    ]


async def test_the_report_shows_its_tables_for_the_baseline_that_is_chosen(tmp_path, visit):  # noqa: F811
    written(tmp_path)
    page = (await visit((tmp_path / "report.html").as_uri())).page
    first = page.locator("#quality table:visible").first
    assert await first.locator("tr.baseline th").text_content() == "base"
    await page.get_by_label("mix", exact=True).check()
    assert await first.locator("tr.baseline th").text_content() == "mix"
    row = first.locator("tbody tr", has=page.locator("th", has_text="base"))
    assert "▼ worse" in await row.first.text_content()
    await page.locator("a[href='items.html']").click()
    assert await names(page) == ["q1", "q2", "q3", "q10", "q4"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_nothing_serious_is_found_on_either_page(tmp_path, visit, axe, scheme):  # noqa: F811
    address = written(tmp_path)
    page = (await visit(address, color_scheme=scheme)).page
    found = await serious(page, axe)
    await page.locator("#items tbody button").first.click()
    found += await serious(page, axe)
    await page.goto((tmp_path / "report.html").as_uri())
    assert found + await serious(page, axe) == []


async def test_on_a_phone_only_tables_scroll_sideways(tmp_path, visit):  # noqa: F811
    page = (await visit(written(tmp_path), width=390)).page
    assert await page.evaluate("document.documentElement.scrollWidth") <= 390
