"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ensemble_server.ensembles.errors import StorageError
from ensemble_server.server.disk.whole_file import whole_file, write_whole


def test_a_file_appears_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600


def test_a_file_that_failed_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "real" / "out")
    with whole_file(link) as file:
        file.write(b"new")
    assert link.is_symlink() and (tmp_path / "real" / "out").read_bytes() == b"new"


def test_a_pipe_takes_what_comes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        with whole_file(tmp_path / "pipe") as file:
            file.write(b"through")
        assert reader.stdout.read() == b"through"
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("path", ["nowhere/out", "."])
def test_a_place_that_takes_no_file_is_told(tmp_path: Path, path: str) -> None:
    with pytest.raises(StorageError, match="cannot be written"), whole_file(tmp_path / path) as file:
        file.write(b"new")


WRITE = """
import resource, signal, sys
from pathlib import Path
from ensemble_server.ensembles.errors import StorageError
from ensemble_server.server.disk.whole_file import whole_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with whole_file(Path(sys.argv[1])) as file:
        for _ in range(100):
            file.write(b"x" * 100_000)
except StorageError as exc:
    print(exc)
"""


def test_a_disk_that_takes_no_more_is_told_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    ended = subprocess.run([sys.executable, "-c", WRITE, path], capture_output=True, text=True, check=True)
    assert "what was there before is unchanged" in ended.stdout
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_files_permissions_stay_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "c.yaml"
    write_whole(path, b"old")
    path.chmod(0o640)
    write_whole(path, "new é\r\n".encode())
    assert path.read_bytes() == "new é\r\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(path.parent) == ["c.yaml"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be made"):
        write_whole(tmp_path / "file" / "out", b"new")
