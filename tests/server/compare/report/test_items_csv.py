from __future__ import annotations

import csv
import json
import re

from ensemble_server.server.compare.report import items_page
from ensemble_server.server.compare.report.items_csv import COLUMNS, write_csv
from ensemble_server.server.compare.report.items_page import items_html
from tests.server.compare.report.items_sample import tables
from tests.server.compare.report.sample import HOSTILE


def test_there_is_a_line_for_each_item_and_arm_with_whole_texts(tmp_path):
    assert write_csv(tables(), tmp_path / "items.csv") == 5 * 3 + 3 * 2
    with (tmp_path / "items.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [*COLUMNS, "row.level"]
    assert lines[1] == {
        "measure": "task sums",
        "item": "q1",
        "arm": "mix",
        "score": "1.0",
        "answer": "42",
        "reference": "42",
        "error": "",
        "output": "mix says 42",
        "prompt": "What is the answer to q1?",
        "row.level": "easy",
    }
    hostile = next(line for line in lines if line["item"] == "q4" and line["arm"] == "base")
    assert hostile["output"] == HOSTILE
    assert hostile["answer"] == "'=1+1", "no spreadsheet takes it for a formula"
    assert hostile["reference"] == "-3", "a number stays one"


def test_the_data_in_the_page_is_what_was_given_and_cannot_end_its_element():
    page = items_html(tables(), title="<b>", baseline="base")
    assert page.count("<script") == 2 and page.count("</script>") == 2
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(embedded.group(1))
    assert data["tables"][0]["rows"][4]["cells"][0][2] == HOSTILE
    assert data["limit"] is None and "<title>&lt;b&gt;: items</title>" in page


def test_texts_that_are_too_much_for_a_page_are_cut_and_say_so(monkeypatch):
    monkeypatch.setattr(items_page, "MAX_TEXT_CHARS", 10)
    monkeypatch.setattr(items_page, "MIN_SHOWN_CHARS", 5)
    page = items_html(tables(), title="t", baseline="base")
    assert "base … (7 more characters)" in page
