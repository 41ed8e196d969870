from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.batch.source.records import (
    BadRecord,
    Record,
    csv_records,
    kind_of_source,
    read_records,
    skipped_in,
)


def test_jsonl_gives_a_record_for_each_line_that_holds_an_object(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    lines = [
        b'\xef\xbb\xbf{"a": 1}',
        b"",
        b"{}",
        b"[1]",
        b'{"a": NaN}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud83d"}',
        b'{"a": 2',
    ]
    file.write_bytes(b"\r\n".join(lines))
    records = list(read_records(file, "jsonl"))
    assert [record for record in records if isinstance(record, Record)] == [Record(1, {"a": 1}), Record(3, {})]
    bad = {record.line: record.error for record in records if isinstance(record, BadRecord)}
    assert list(bad) == [4, 5, 6, 7, 8]
    assert bad[4] == "must be a JSON object, got list"
    assert all(bad[line].startswith("is not JSON: ") for line in (5, 6, 7, 8))
    assert [line for line, error in bad.items() if error.endswith("the file ends in the middle of it")] == [8]


def test_csv_gives_texts_and_the_line_where_a_record_begins(tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    file.write_bytes('\ufeffid,text\n1,"two\nlines, ""quoted"""\n\n2,naïve\n'.encode())
    assert list(read_records(file, "csv")) == [
        Record(2, {"id": "1", "text": 'two\nlines, "quoted"'}),
        Record(5, {"id": "2", "text": "naïve"}),
    ]
    file.write_text("id\ttext\n1\ta,b\n", encoding="utf-8")
    assert list(read_records(file, "tsv")) == [Record(2, {"id": "1", "text": "a,b"})]


def test_a_bad_line_of_csv_costs_its_own_row_and_keeps_its_id(tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    file.write_bytes(b'id,text\n1,a,b\n2\n3,caf\xe9\n4,"a"b\n5,fine\n6,"torn')
    records = list(read_records(file, "csv"))
    assert records[0] == BadRecord(2, "has 3 fields, the header has 2", {"id": "1", "text": "a"})
    assert records[1] == BadRecord(3, "has 1 fields, the header has 2", {"id": "2"})
    assert records[2] == BadRecord(4, "column 'text' is not UTF-8", {"id": "3"})
    assert isinstance(records[3], BadRecord)
    assert records[3].error.startswith("is not CSV: ")
    assert records[4] == Record(6, {"id": "5", "text": "fine"})
    assert records[5] == BadRecord(7, "is not CSV: unexpected end of data")


@pytest.mark.parametrize("text", ["", "\n", "a,a\n1,2\n"])
def test_csv_needs_a_header_of_different_names(tmp_path: Path, text: str) -> None:
    file = tmp_path / "in.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="names"):
        list(read_records(file, "csv"))


@pytest.mark.parametrize(
    ("text", "kind", "mark"),
    [
        ("id;q\n1;a\n", "csv", "';'"),
        ("sep=;\nid;q\n1;a\n", "csv", "';'"),
        ("id\tq\n1\ta\n", "csv", "'\\t'"),
        ("id,q\n", "tsv", "','"),
    ],
)
def test_a_table_with_other_marks_between_its_columns_is_named(tmp_path: Path, text: str, kind: Any, mark: str) -> None:
    file = tmp_path / "in.txt"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="its first row is one column") as refused:
        list(read_records(file, kind))
    assert f"not by {mark}" in str(refused.value)


def test_a_table_of_one_column_may_have_any_name(tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    file.write_text("What is asked; in words\nWhy?\n", encoding="utf-8")
    assert [dict(record.values) for record in read_records(file, "csv")] == [{"What is asked; in words": "Why?"}]


def test_a_prompt_may_be_longer_than_the_csv_modules_default_limit(tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    file.write_text(f"text\n{'x' * 200_000}\n", encoding="utf-8")
    [record] = read_records(file, "csv")
    assert len(record.values["text"]) == 200_000


@pytest.mark.slow
@given(st.lists(st.tuples(st.text(min_size=1), st.text()), max_size=5))
def test_what_a_csv_writer_wrote_is_read_back(rows: list[tuple[str, str]]) -> None:
    rows = [row for row in rows if not any("\0" in cell or "\r" in cell for cell in row)]
    written = io.StringIO(newline="")
    csv.writer(written).writerows([("a", "b"), *rows])
    read = csv_records(io.StringIO(written.getvalue(), newline=""), delimiter=",", name="t.csv")
    assert [tuple(record.values.values()) for record in read] == rows


def test_parquet_gives_values_as_json_has_them(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    values = {
        "id": [1, None],
        "text": ["a", None],
        "when": [datetime.date(2026, 1, 2), None],
        "price": [Decimal("1.50"), None],
        "raw": [b"bytes", None],
        "options": [["x", "y"], []],
        "nested": [{"a": 1}, None],
    }
    parquet.write_table(pyarrow.table(values), tmp_path / "in.parquet")
    first, second = read_records(tmp_path / "in.parquet", "parquet")
    assert first == Record(
        1,
        {
            "id": 1,
            "text": "a",
            "when": "2026-01-02",
            "price": "1.50",
            "raw": "bytes",
            "options": ["x", "y"],
            "nested": {"a": 1},
        },
    )
    assert json.dumps(second.values)
    assert second.values["text"] is None


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    file = tmp_path / "in.parquet"
    file.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ConfigError, match=r"in\.parquet: not a Parquet file"):
        list(read_records(file, "parquet"))


def test_a_folder_gives_its_files_in_order_of_their_names(tmp_path: Path) -> None:
    for name, content in (("b.txt", b"B\n"), ("a.md", b"A"), (".hidden", b"no"), ("c.txt", b"\xff")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "sub").mkdir()
    assert list(read_records(tmp_path, "folder")) == [
        Record(1, {"id": "a", "name": "a.md", "text": "A"}),
        Record(2, {"id": "b", "name": "b.txt", "text": "B\n"}),
        BadRecord(3, "c.txt: must be UTF-8 text, byte 0 is not", {"id": "c", "name": "c.txt"}),
    ]


def test_the_kind_of_a_source_is_said_or_told_from_its_name(tmp_path: Path) -> None:
    assert kind_of_source(tmp_path) == "folder"
    assert kind_of_source(Path("IN.CSV")) == "csv"
    assert kind_of_source(Path("rows"), "parquet") == "parquet"
    with pytest.raises(ConfigError, match="say --input-format jsonl"):
        kind_of_source(Path("rows"))


def test_a_json_array_gives_a_record_for_each_item_and_its_line(tmp_path: Path) -> None:
    file = tmp_path / "in.json"
    objects = [{"id": "a", "n": [1, {"x": "]"}]}, {"id": "é"}, {}]
    for indent, lines in ((1, [2, 11, 14]), (None, [1, 1, 1])):
        file.write_text(json.dumps(objects, indent=indent), encoding="utf-8-sig")
        assert list(read_records(file, "jsonl")) == [
            Record(line, values) for line, values in zip(lines, objects, strict=True)
        ]
    file.write_text("\n [ ]\n", encoding="utf-8")
    assert list(read_records(file, "jsonl")) == []


def test_objects_over_several_lines_each_are_records_too(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(json.dumps({"n": n}, indent=2) for n in range(3)), encoding="utf-8")
    assert list(read_records(file, "jsonl")) == [Record(1, {"n": 0}), Record(4, {"n": 1}), Record(7, {"n": 2})]


def test_an_item_of_an_array_that_is_no_object_costs_its_own_row(tmp_path: Path) -> None:
    file = tmp_path / "in.json"
    file.write_text('[{"a": 1},\n"text",\n{"a": 2}]', encoding="utf-8")
    assert list(read_records(file, "jsonl")) == [
        Record(1, {"a": 1}),
        BadRecord(2, "must be a JSON object, got str"),
        Record(3, {"a": 2}),
    ]


def test_half_a_character_costs_its_own_row(tmp_path: Path) -> None:
    array, lines = tmp_path / "in.json", tmp_path / "in.jsonl"
    array.write_text('[{"a": "\\ud83d"},\n{"a": "\\ud83d\\ude00"}]', encoding="utf-8")
    lines.write_text('{"a": "\\ud83d"}\n{"a": "\\ud83d\\ude00"}\n', encoding="utf-8")
    for file in (array, lines):
        bad, good = read_records(file, "jsonl")
        assert isinstance(bad, BadRecord)
        assert good == Record(2, {"a": "\U0001f600"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[\n{"a": 1},\n{"a": \n', "line 4"),
        ('[\n{"a": 1}\n', "is not closed"),
        ('[\n{"a": 1}\n{"a": 2}]', "line 3"),
        ('[\n{"a": NaN}]', "line 2"),
        ("{\n'a': 1}", "line 2"),
    ],
)
def test_a_broken_array_is_refused_in_one_sentence_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "in.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        list(read_records(file, "jsonl"))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_text_is_read_and_damage_is_named(tmp_path: Path, pack: Any) -> None:
    jsonl, table = tmp_path / "in.jsonl.gz", tmp_path / "in.csv.gz"
    jsonl.write_bytes(pack(b'{"a": 1}\n' * 3))
    table.write_bytes(pack("a,b\n1,é\n".encode()))
    assert [record.line for record in read_records(jsonl, kind_of_source(jsonl))] == [1, 2, 3]
    assert list(read_records(table, kind_of_source(table))) == [Record(2, {"a": "1", "b": "é"})]
    jsonl.write_bytes(pack(b'{"a": 1}\n' * 3)[:-9])
    with pytest.raises(ConfigError, match=r"in\.jsonl\.gz: the \w+ file is damaged or was cut off"):
        list(read_records(jsonl, "jsonl"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_in_utf_16_is_read(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "in"
    file.write_bytes('{"a": "é\u0a0a"}\n\n{"a": "日本"}\n'.encode(encoding))
    read = [(record.line, record.values["a"]) for record in read_records(file, "jsonl")]
    assert read == [(1, "é\u0a0a"), (3, "日本")]
    file.write_bytes("id\ttext\n1\té\n".encode(encoding))
    assert list(read_records(file, "tsv")) == [Record(2, {"id": "1", "text": "é"})]


def test_text_that_stops_being_utf_16_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    file.write_bytes("a,b\n1,2\n".encode("utf-16") + b"x")
    with pytest.raises(ConfigError, match=r"in\.csv: begins as UTF-16"):
        list(read_records(file, "csv"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04rest", "Excel workbook"),
        (b"\x28\xb5\x2f\xfdrest", "Zstandard"),
        (b"PAR1rest", "say --input-format parquet"),
        (gzip.compress(b"%PDF-1.7", mtime=0), "holds a PDF"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "in.csv"
    file.write_bytes(content)
    for kind in ("csv", "jsonl"):
        with pytest.raises(ConfigError, match=said):
            list(read_records(file, kind))


def test_a_quote_that_is_not_closed_names_the_lines_that_it_swallowed(tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    file.write_text('id,q\n1,one\n2,"two\n3,three\n4,four\n', encoding="utf-8")
    read = list(read_records(file, "csv"))
    assert read[0] == Record(2, {"id": "1", "q": "one"})
    [torn] = read[1:]
    assert isinstance(torn, BadRecord)
    assert "a quote that opens in line 3 makes lines 3 to 5 one row" in torn.error
    file.write_text('id,q\n2,"two\n3,"three"\n4,four\n', encoding="utf-8")
    torn, after = read_records(file, "csv")
    assert isinstance(torn, BadRecord)
    assert "lines 2 to 3" in torn.error
    assert after == Record(4, {"id": "4", "q": "four"})
    file.write_text('id,q\n2,"two\n3,three"\n4,"x\n5,y",z\n', encoding="utf-8")
    [bad] = [record.error for record in read_records(file, "csv") if isinstance(record, BadRecord)]
    assert bad.startswith("has 3 fields, the header has 2; a quote that opens in line 4 makes lines 4 to 5 one row")
    file.write_text('"id,q\n1,one\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="lines 1 to 2 one row"):
        list(read_records(file, "csv"))


def test_what_is_left_out_of_a_folder_is_known(tmp_path: Path) -> None:
    for name in ("a.txt", ".hidden"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    (tmp_path / "sub").mkdir()
    assert skipped_in(tmp_path) == [".hidden", "sub"]


def test_files_of_a_folder_may_be_compressed_or_utf_16(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é".encode("utf-16"))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"B", mtime=0))
    (tmp_path / "c.docx").write_bytes(b"PK\x03\x04")
    first, second, third = read_records(tmp_path, "folder")
    assert (first.values["text"], second.values["text"]) == ("é", "B")
    assert isinstance(third, BadRecord)
    assert third.error.startswith("c.docx: is a ZIP archive or an Excel workbook")
