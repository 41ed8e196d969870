from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.compare.kept.content_cache import cached_folder, folder_digest, is_whole


def write_answer(out: Path) -> None:
    (out / "answer.txt").write_text("42", encoding="utf-8")


def test_a_folder_is_built_once(tmp_path: Path) -> None:
    folder = cached_folder(tmp_path / "a", write_answer)
    assert (folder / "answer.txt").read_text() == "42"
    assert is_whole(folder)
    cached_folder(folder, lambda out: pytest.fail("was built again"))


def test_builders_at_the_same_time_build_once(tmp_path: Path) -> None:
    num_builds = 0
    start = threading.Barrier(4)

    def build(out: Path) -> None:
        nonlocal num_builds
        num_builds += 1
        write_answer(out)

    def ask() -> None:
        start.wait()
        cached_folder(tmp_path / "a", build)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert num_builds == 1


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        write_answer(out)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cached_folder(tmp_path / "a", fail)
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_what_a_killed_build_left_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "half.txt").write_text("4", encoding="utf-8")
    assert {path.name for path in cached_folder(tmp_path / "a", write_answer).iterdir()} == {"answer.txt", "SHA256SUMS"}


@pytest.mark.parametrize("damage", ["changed", "missing", "no sums"])
def test_a_damaged_folder_is_built_again(tmp_path: Path, damage: str) -> None:
    folder = cached_folder(tmp_path / "a", write_answer)
    if damage == "changed":
        (folder / "answer.txt").write_text("forty-one", encoding="utf-8")
    else:
        (folder / ("answer.txt" if damage == "missing" else "SHA256SUMS")).unlink()
    assert not is_whole(folder)
    cached_folder(folder, write_answer)
    assert (folder / "answer.txt").read_text() == "42"
    assert is_whole(folder)


def test_a_folder_that_cannot_be_written_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(ModelLoadError, match="set ENSEMBLE_CACHE"):
        cached_folder(tmp_path / "file" / "a", write_answer)


def test_a_digest_follows_the_model_and_not_its_read_me(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    first = folder_digest(tmp_path)
    (tmp_path / "README.md").write_text("hello", encoding="utf-8")
    assert folder_digest(tmp_path) == first
    (tmp_path / "config.json").write_text("{ }", encoding="utf-8")
    assert folder_digest(tmp_path) != first
