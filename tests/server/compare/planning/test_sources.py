from __future__ import annotations

from pathlib import Path

import pytest

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.planning.blocks import TaskSource, TextSource
from ensemble_server.server.compare.planning.sources import (
    read_clusters,
    read_text_clusters,
    read_texts,
    sha256_of,
    tail_of,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("".join(f"line {number:03} ü\n" for number in range(100)), encoding="utf-8")
    return tmp_path / "a.txt"


def text_of(source: TextSource, **others: TextSource) -> str:
    return "".join(read_texts({"text": source, **others}, min_bytes=40)["text"].texts)


def test_the_tail_is_the_part_that_training_held_out(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    border = text.index("\n", int(len(text) * (1 - 0.05))) + 1  # as experts/train.py has it
    assert text_of(TextSource(path=str(file), tail=0.05)) == text[border:] == tail_of(text, 0.05)


def test_bytes_cut_between_characters(file: Path) -> None:
    whole = file.read_text(encoding="utf-8")
    cut = text_of(TextSource(path=str(file), bytes=10))  # byte 10 is inside of ü
    assert cut == whole[:9] and len(cut.encode()) <= 10


def test_a_switching_text_takes_whole_pieces_of_each_in_turn(file: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b" * 1000, encoding="utf-8")
    parts = {"a": TextSource(path=str(file)), "b": TextSource(path=str(tmp_path / "b.txt"))}
    text = text_of(TextSource(switching=("a", "b"), piece_bytes=50, bytes=400), **parts)
    assert len(text.encode()) <= 400 and text.count("b" * 50) == 4
    assert text.startswith("line 000")
    assert text == text_of(TextSource(switching=("a", "b"), piece_bytes=50, bytes=400), **parts)


def test_the_hash_tells_texts_and_cuts_apart(file: Path) -> None:
    source = {"text": TextSource(path=str(file))}
    one, again, other = (read_texts(source, min_bytes=size)["text"] for size in (40, 40, 60))
    assert sha256_of(one) == sha256_of(again) != sha256_of(other)


def test_a_tail_that_leaves_nothing_is_an_error(file: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is left"):
        text_of(TextSource(path=str(file), tail=0.001))


def test_rows_that_go_together_are_known_by_a_field(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": 1, "passage": "a"}\n{"q": 2, "passage": "a"}\n{"q": 3}\n', encoding="utf-8")
    source = {"name": "t", "data": str(rows), "metric": "number", "template": "x", "cluster": "passage"}
    assert read_clusters([TaskSource(**source, limit=2)]) == {"task t": ["a", "a"]}
    assert read_clusters([TaskSource(**source | {"cluster": None})]) == {}
    with pytest.raises(ConfigError, match="line 3: has no field 'passage'"):
        read_clusters([TaskSource(**source)])


def test_documents_that_go_together_are_known_by_a_field(tmp_path):
    rows = tmp_path / "texts.jsonl"
    rows.write_text('{"text": "one", "by": "a"}\n\n{"text": "two", "by": "b"}\n{"text": "three"}\n', encoding="utf-8")
    source = {"letters": TextSource(path=str(rows), bytes=7, cluster="by")}
    assert read_text_clusters(source, read_texts(source, min_bytes=1)) == {"text letters": ["a", "b"]}
    source = {"letters": TextSource(path=str(rows), cluster="by")}
    with pytest.raises(ConfigError, match="line 4: has no field 'by'"):
        read_text_clusters(source, read_texts(source, min_bytes=1))
    with pytest.raises(ValueError, match=r"names a field of the rows of a \.jsonl file"):
        TextSource(path="a.txt", cluster="by")
