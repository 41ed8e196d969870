from __future__ import annotations

import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_server.ensembles.errors import ConflictError, StorageBusyError, StorageDamagedError, StorageError
from ensemble_server.server.batch.uploads.catalogue import Batch, Catalogue, LineError, StoredFile, new_id


@pytest.fixture
def catalogue(tmp_path: Path):
    catalogue = Catalogue(tmp_path / "catalogue.sqlite")
    yield catalogue
    catalogue.close()


def a_file(**changes) -> StoredFile:
    now = int(time.time())
    values = {"owner": "me", "filename": "f", "purpose": "batch", "num_bytes": 3, "created_at": now}
    return StoredFile(**{"id": new_id("file-"), "expires_at": now + 3600} | values | changes)


def a_batch(**changes) -> Batch:
    now = int(time.time())
    values = {"owner": "me", "endpoint": "/v1/embeddings", "input_file_id": "file-1", "completion_window": "24h"}
    state = {"expires_at": now + 86400, "status": "validating", "reached": {"validating": now}}
    return Batch(**{"id": new_id("batch_")} | values | state | changes)


def test_what_was_added_is_there_when_it_is_opened_again(catalogue, tmp_path):
    file = a_file(filename="ünï.jsonl")
    batch = a_batch(metadata={"a": "b"}, errors=(LineError("code", "why", "param", 3),), output_expires_after_s=5)
    catalogue.add_file(file)
    assert catalogue.add_batch(batch, max_live=1)
    again = Catalogue(tmp_path / "catalogue.sqlite")
    assert again.file(file.id, "me") == file
    assert again.batch(batch.id, "me") == batch
    again.close()


def test_what_is_anothers_is_not_there(catalogue):
    file, batch = a_file(), a_batch()
    catalogue.add_file(file)
    catalogue.add_batch(batch, max_live=1)
    assert catalogue.file(file.id, "you") is catalogue.batch(batch.id, "you") is None
    assert catalogue.files("you", purpose=None, after=None, limit=9, order="asc") == []
    assert catalogue.batches("you", after=None, limit=9) == []


def test_a_change_that_fails_changes_nothing_and_adds_no_file(catalogue):
    batch, file = a_batch(), a_file()
    catalogue.add_batch(batch, max_live=1)

    def refuse(_: Batch) -> Batch:
        raise ConflictError("no")

    with pytest.raises(ConflictError):
        catalogue.change_batch(batch.id, refuse, new_files=[file])
    catalogue.add_file(file)
    with pytest.raises(StorageError, match="UNIQUE"):
        catalogue.change_batch(batch.id, lambda batch: batch.moved("failed"), new_files=[file])
    assert catalogue.batch(batch.id, "me") == batch


def test_changes_from_many_threads_are_all_kept(catalogue):
    batch = a_batch()
    catalogue.add_batch(batch, max_live=1)

    def count_one(batch: Batch) -> Batch:
        return batch.moved("in_progress", total=batch.total + 1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: catalogue.change_batch(batch.id, count_one), range(40)))
    assert catalogue.batch(batch.id, "me").total == 40


def test_only_live_batches_of_the_same_owner_fill_his_share(catalogue):
    ended = a_batch(status="completed")
    assert all(catalogue.add_batch(batch, max_live=2) for batch in (ended, a_batch(), a_batch()))
    assert not catalogue.add_batch(a_batch(), max_live=2)
    assert catalogue.add_batch(a_batch(owner="you"), max_live=2)
    assert len(catalogue.live_batches()) == 3


def test_the_input_of_a_batch_that_has_not_read_it_is_kept_beyond_its_time(catalogue):
    needed, other = a_file(expires_at=1), a_file(expires_at=1)
    catalogue.add_file(needed)
    catalogue.add_file(other)
    catalogue.add_batch(a_batch(input_file_id=needed.id), max_live=1)
    assert catalogue.forget_expired(batches_before=0) == [other.id]


@settings(max_examples=30)
@given(st.lists(st.booleans(), max_size=12), st.integers(1, 5), st.sampled_from(["asc", "desc"]))
def test_pages_together_are_the_whole_list(tmp_path_factory, mine, limit, order):
    catalogue = Catalogue(tmp_path_factory.mktemp("pages") / "catalogue.sqlite")
    files = [a_file(owner="me" if is_mine else "you") for is_mine in mine]
    for file in files:
        catalogue.add_file(file)
    seen, after = [], None
    while page := catalogue.files("me", purpose="batch", after=after, limit=limit, order=order):
        assert len(page) <= limit
        seen += page
        after = page[-1].id
    catalogue.close()
    expected = [file for file in files if file.owner == "me"]
    assert seen == (expected if order == "asc" else expected[::-1])


def test_ids_are_in_the_order_of_time():
    ids = [new_id("x") for _ in range(100)]
    assert len(set(ids)) == 100
    assert [text[:17] for text in ids] == sorted(text[:17] for text in ids)


def test_a_catalogue_of_another_version_or_none_at_all_is_left_alone(tmp_path):
    path = tmp_path / "catalogue.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StorageError, match="another version"):
        Catalogue(path)
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(StorageError, match="not a database"):
        Catalogue(path)


def test_a_catalogue_that_another_program_holds_is_busy_at_once(tmp_path):
    catalogue = Catalogue(tmp_path / "c.sqlite")
    other = sqlite3.connect(tmp_path / "c.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StorageBusyError, match="another program holds it"):
        catalogue.remove_file("file-1")
    other.execute("ROLLBACK")
    catalogue.remove_file("file-1")
    other.close()
    catalogue.close()


def test_a_damaged_catalogue_says_so(tmp_path):
    (tmp_path / "c.sqlite").write_bytes(b"no database " * 1000)
    with pytest.raises(StorageDamagedError, match=r"batch\.folder"):
        Catalogue(tmp_path / "c.sqlite")
