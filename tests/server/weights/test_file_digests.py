"""A digest is kept while the file stays as it is, and never believed of another content."""

import hashlib
import os

import pytest

from ensemble_server.server.weights import file_digests
from ensemble_server.server.weights.file_digests import known_sha256


@pytest.fixture
def settled(monkeypatch, tmp_path):
    """Files count as settled at once, and digests are kept beside the test."""
    monkeypatch.setattr(file_digests, "SETTLED_NS", -1)
    monkeypatch.setenv("ENSEMBLE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def reads(monkeypatch):
    """Every content that is read for a digest."""
    seen, digest = [], hashlib.file_digest

    def counted(stream, name):
        seen.append(stream.name)
        return digest(stream, name)

    monkeypatch.setattr(file_digests.hashlib, "file_digest", counted)
    return seen


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_an_unchanged_file_is_read_once(settled, reads, tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    assert [known_sha256(file), known_sha256(file)] == [sha256(b"abc")] * 2
    assert len(reads) == 1


def test_a_content_of_the_same_length_and_time_is_read_again(settled, tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    assert known_sha256(file) == sha256(b"abc")
    other = tmp_path / "other"
    other.write_bytes(b"xyz")
    os.utime(other, ns=times)  # as `cp -p` and archives do
    other.replace(file)
    assert known_sha256(file) == sha256(b"xyz")


def test_a_file_that_was_written_just_now_is_read_again(reads, monkeypatch, tmp_path):
    monkeypatch.setenv("ENSEMBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_digests, "SETTLED_NS", 10**15)
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    assert [known_sha256(file), known_sha256(file)] == [sha256(b"abc")] * 2
    assert len(reads) == 2


@pytest.mark.parametrize("kept", [b"", b"{", b"[]", b'{"state": 1}', b"\xff"])
def test_a_damaged_note_is_written_anew(settled, kept, tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    known_sha256(file)
    (note,) = (tmp_path / "cache/digests").iterdir()
    note.write_bytes(kept)
    assert known_sha256(file) == sha256(b"abc")
    assert sha256(b"abc").encode() in note.read_bytes()


def test_a_cache_that_cannot_be_written_changes_nothing(settled, monkeypatch, tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    (tmp_path / "occupied").write_bytes(b"")
    monkeypatch.setenv("ENSEMBLE_CACHE", str(tmp_path / "occupied"))
    assert known_sha256(file) == sha256(b"abc")


def test_a_file_that_cannot_be_read_is_an_error(settled, tmp_path):
    with pytest.raises(FileNotFoundError):
        known_sha256(tmp_path / "nothing")
