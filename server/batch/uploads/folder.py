"""The folder in which a server keeps files and batches. One process holds it at a time.

    lock                    held while the server lives; the kernel frees it if the process dies
    catalogue.sqlite        what exists, and whose it is (`server.batch.uploads.catalogue`)
    files/ID                the bytes of a file; files/ID.partial while they arrive
    jobs/ID.sqlite          the rows of a batch that has not ended (`server.batch.job.store`)

A file comes into being in three steps, each on disk before the next: its bytes, its name, its row in the catalogue.
Whatever has no row was cut short by a crash, and is removed when the folder is opened.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Self

from filelock import FileLock, Timeout

from ensemble_server.ensembles.errors import FolderInUseError, StorageError
from ensemble_server.server.batch.uploads.catalogue import Catalogue, Purpose, StoredFile, new_id
from ensemble_server.server.disk.whole_file import give_name

DAY_S = 24 * 3600


class BatchFolder:
    """An open folder. Methods may be called from any thread; they block on the disk. Raises `StorageError`."""

    def __init__(self, path: Path, lock: FileLock, catalogue: Catalogue, *, retention_days: float) -> None:
        self.path = path
        self.catalogue = catalogue
        self._lock = lock
        self._retention_s = int(retention_days * DAY_S)

    @classmethod
    def open(cls, path: Path, *, retention_days: float) -> Self:
        """Claim the folder at `path`, made if need be, and remove what a crash has left half done.

        Raises `FolderInUseError` if another process has claimed it.
        """
        with disk_heeded("batch.folder cannot be used"):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)  # prompts are nobody else's business
            for part in ("files", "jobs"):
                (path / part).mkdir(exist_ok=True)
            lock = FileLock(path / "lock", timeout=0, thread_local=False)
            try:
                lock.acquire()
            except Timeout as exc:
                raise FolderInUseError(
                    "batch.folder: another server works in it; give this one a folder of its own, or stop the other"
                ) from exc
        try:
            catalogue = Catalogue(path / "catalogue.sqlite")
        except BaseException:
            lock.release()
            raise
        folder = cls(path, lock, catalogue, retention_days=retention_days)
        try:
            folder._remove_leftovers()
        except BaseException:
            folder.close()
            raise
        return folder

    def close(self) -> None:
        self.catalogue.close()
        self._lock.release()

    def file_path(self, file_id: str) -> Path:
        return self.path / "files" / file_id

    def job_path(self, batch_id: str) -> Path:
        return self.path / "jobs" / f"{batch_id}.sqlite"

    def new_file(self) -> NewFile:
        return NewFile(self.path / "files", self._retention_s)

    def delete_file(self, file_id: str) -> None:
        self.catalogue.remove_file(file_id)
        with disk_heeded(f"file {file_id} cannot be deleted"):
            self.file_path(file_id).unlink(missing_ok=True)

    def delete_job(self, batch_id: str) -> None:
        """Remove the rows of a batch, once its output files are there."""
        with disk_heeded(f"the rows of batch {batch_id} cannot be deleted"):
            for path in self.job_path(batch_id).parent.glob(f"{batch_id}.*"):
                path.unlink(missing_ok=True)

    def sweep(self) -> int:
        """Delete files whose time is over and batches that ended long ago. Returns how many files."""
        expired = self.catalogue.forget_expired(batches_before=int(time.time()) - self._retention_s)
        with disk_heeded("expired files cannot be deleted"):
            for file_id in expired:
                self.file_path(file_id).unlink(missing_ok=True)
        return len(expired)

    def _remove_leftovers(self) -> None:
        files = self.catalogue.file_ids()
        live = {batch.id for batch in self.catalogue.live_batches()}
        with disk_heeded("batch.folder cannot be tidied"):
            for path in (self.path / "files").iterdir():
                if path.name not in files:
                    path.unlink()
            for path in (self.path / "jobs").iterdir():
                if path.name.partition(".")[0] not in live:
                    path.unlink()


class NewFile:
    """A file that is being written. It exists for clients only once the catalogue has what `finished` returns."""

    def __init__(self, folder: Path, retention_s: int) -> None:
        self.id = new_id("file-")
        self.num_bytes = 0
        self._path = folder / self.id
        self._partial = folder / f"{self.id}.partial"
        self._retention_s = retention_s
        with disk_heeded("the file cannot be written"):
            self._file: BinaryIO = self._partial.open("xb")

    def write(self, data: bytes) -> None:
        with disk_heeded("the file cannot be written"):
            self._file.write(data)
        self.num_bytes += len(data)

    def finished(self, *, owner: str, filename: str, purpose: Purpose, expires_after_s: int | None) -> StoredFile:
        """Bring all bytes to the disk and give the file its name. It expires as asked, or after `retention_days`."""
        with disk_heeded("the file cannot be written"):
            self._file.close()
            give_name(self._partial, self._path)
        now = int(time.time())
        expires_at = now + (expires_after_s or self._retention_s)
        return StoredFile(self.id, owner, filename, purpose, self.num_bytes, now, expires_at)

    def discard(self) -> None:
        """Leave nothing of it on the disk. May be called in any state."""
        with suppress(OSError):  # its last bytes do not fit onto the disk either; it is closed all the same
            self._file.close()
        self._partial.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)


@contextmanager
def disk_heeded(what: str) -> Iterator[None]:
    """Turn an `OSError` into a `StorageError` that says what could not be done. Paths inside the folder stay unsaid."""
    try:
        yield
    except OSError as exc:
        raise StorageError(f"{what}: {exc.strerror or exc}") from exc
