from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ensemble_server.ensembles.errors import FolderInUseError, StorageError
from ensemble_server.server.batch.uploads.folder import BatchFolder

HOLD = """
import sys
from pathlib import Path
from ensemble_server.server.batch.uploads.folder import BatchFolder
folder = BatchFolder.open(Path(sys.argv[1]), retention_days=1)
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path):
    folder = BatchFolder.open(tmp_path / "kept", retention_days=2)
    yield folder
    folder.close()


def keep(folder: BatchFolder, content: bytes, **changes):
    new = folder.new_file()
    new.write(content)
    values = {"owner": "me", "filename": "f", "purpose": "batch", "expires_after_s": None}
    file = new.finished(**values | changes)
    folder.catalogue.add_file(file)
    return file


def test_a_file_lives_as_long_as_asked_or_as_the_folder_says(folder):
    file, short = keep(folder, b"abc"), keep(folder, b"abc", expires_after_s=60)
    assert (file.num_bytes, file.expires_at - file.created_at) == (3, 2 * 86400)
    assert short.expires_at - short.created_at == 60
    assert folder.file_path(file.id).read_bytes() == b"abc"


def test_what_is_discarded_leaves_nothing_in_any_state(folder):
    begun, finished = folder.new_file(), folder.new_file()
    begun.write(b"x")
    finished.write(b"x")
    finished.finished(owner="me", filename="f", purpose="batch", expires_after_s=None)
    for new in (begun, finished, finished):
        new.discard()
    assert list((folder.path / "files").iterdir()) == []


def test_prompts_are_for_the_servers_user_alone(folder):
    assert folder.path.stat().st_mode & 0o077 == 0


def test_a_process_that_holds_the_folder_keeps_others_out_until_it_is_killed(tmp_path):
    path = tmp_path / "kept"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(FolderInUseError, match="another server works in it"):
            BatchFolder.open(path, retention_days=1)
    finally:
        holder.kill()
        holder.communicate()
    BatchFolder.open(path, retention_days=1).close()


def test_a_folder_that_failed_to_open_can_be_opened_once_that_is_mended(tmp_path):
    path = tmp_path / "kept"
    path.mkdir()
    (path / "catalogue.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(StorageError):
        BatchFolder.open(path, retention_days=1)
    (path / "catalogue.sqlite").unlink()
    BatchFolder.open(path, retention_days=1).close()


def test_leftovers_of_a_crash_go_and_everything_else_stays(tmp_path):
    folder = BatchFolder.open(tmp_path / "kept", retention_days=1)
    file = keep(folder, b"abc")
    half = folder.new_file()
    half.write(b"half")
    folder.job_path("batch_gone").write_bytes(b"rows")
    folder.close()
    half._file.close()  # as the end of a process does
    folder = BatchFolder.open(tmp_path / "kept", retention_days=1)
    assert [path.name for path in (folder.path / "files").iterdir()] == [file.id]
    assert list((folder.path / "jobs").iterdir()) == []
    folder.close()
