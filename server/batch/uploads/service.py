"""Files and batches of a server, and the batches at work: what the routes ask of, and what lives as long as they do.

Nothing is written until the first upload makes the folder. A server that finds one goes on with the batches in it. If
another process holds the folder, this server has no files and batches until that one is gone; all else works.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO

from ensemble_server.ensembles.errors import NotFoundError, OverloadedError, RequestError, StorageError
from ensemble_server.server.batch.job.rows import Url
from ensemble_server.server.batch.uploads.catalogue import LIVE, Batch, Order, StoredFile, new_id
from ensemble_server.server.batch.uploads.disk_threads import DiskThreads
from ensemble_server.server.batch.uploads.folder import DAY_S, BatchFolder, NewFile, disk_heeded
from ensemble_server.server.batch.uploads.lifecycle import LiveBatch, cancelled
from ensemble_server.server.batch.uploads.turns import Turns

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting
    from ensemble_server.server.limits.accounts import Accounts
    from ensemble_server.server.metrics import Metrics

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 60.0  # for a client with too many live batches


class BatchService:
    """`owner` is who asks: nobody sees what belongs to another. Methods raise `StorageError` if the disk does not obey,
    and `NotFoundError` where an id names nothing of the owner's."""

    def __init__(self, hosting: Hosting, metrics: Metrics, accounts: Accounts) -> None:
        self._hosting = hosting
        self._metrics = metrics
        self._accounts = accounts
        self._config = hosting.config.batch
        self._turns = Turns(self._config.max_running)
        self._threads = DiskThreads()
        self._folder: BatchFolder | None = None
        self._opening: asyncio.Task[BatchFolder] | None = None
        self._live: dict[str, LiveBatch] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._is_paused = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While the block runs, batches do: first those that an earlier server has left. It ends with all paused."""
        try:
            await self._existing_folder()
        except StorageError as exc:
            logger.warning("files and batches cannot be had until this is mended: %s", exc)
        sweeping = asyncio.create_task(self._sweep_daily())
        try:
            yield
        finally:
            sweeping.cancel()
            self.pause()
            if self._opening is not None:
                await asyncio.gather(self._opening, return_exceptions=True)
            await asyncio.gather(sweeping, *self._tasks.values(), return_exceptions=True)
            if self._folder is not None:
                await self._threads.catalogue(self._folder.close)
                self._folder = None

    @property
    def num_waiting(self) -> int:
        """How many requests wait for the catalogue."""
        return self._threads.num_waiting

    def pause(self) -> None:
        """Answer no more rows. The batches go on with the next server."""
        self._is_paused = True
        for live in self._live.values():
            live.pause()

    # --- files ---

    async def new_file(self) -> NewFile:
        """A file to `write` an upload into; `keep_file` or `discard` it."""
        folder = await self._open_folder()
        return await self._threads.files(folder.new_file)

    async def write(self, new: NewFile, data: bytes) -> None:
        await self._threads.files(new.write, data)

    async def discard(self, new: NewFile) -> None:
        """Leave nothing of a new file, in whatever state it is."""
        await self._threads.files(new.discard)

    async def keep_file(self, new: NewFile, *, owner: str, filename: str, expires_after_s: int | None) -> StoredFile:
        folder = await self._open_folder()
        file = await self._threads.files(
            new.finished, owner=owner, filename=filename, purpose="batch", expires_after_s=expires_after_s
        )
        await self._threads.catalogue(folder.catalogue.add_file, file)
        return file

    async def file(self, file_id: str, owner: str) -> StoredFile:
        folder = await self._existing_folder()
        file = folder and await self._threads.catalogue(folder.catalogue.file, file_id, owner)
        if not file:
            raise _no_such("file", file_id)
        return file

    async def files(
        self, owner: str, *, purpose: str | None, after: str | None, limit: int, order: Order
    ) -> list[StoredFile]:
        folder = await self._existing_folder()
        if folder is None:
            return []
        return await self._threads.catalogue(
            folder.catalogue.files, owner, purpose=purpose, after=after, limit=limit, order=order
        )

    async def content(self, file_id: str, owner: str) -> tuple[StoredFile, BinaryIO]:
        """The file, and its bytes to read; they stay readable if it is deleted meanwhile. The caller closes them."""
        file = await self.file(file_id, owner)
        folder = await self._open_folder()

        def opened() -> BinaryIO:
            with disk_heeded(f"file {file_id} cannot be read"):
                return folder.file_path(file_id).open("rb")

        return file, await self._threads.files(opened)

    async def read(self, content: BinaryIO, num_bytes: int) -> bytes:
        """The next bytes of what `content` opened; b"" at its end."""
        return await self._threads.files(content.read, num_bytes)

    async def num_bytes_kept(self, owner: str) -> int:
        """Of the owner's uploads."""
        folder = await self._existing_folder()
        return 0 if folder is None else await self._threads.catalogue(folder.catalogue.num_bytes_uploaded, owner)

    async def delete_file(self, file_id: str, owner: str) -> None:
        await self.file(file_id, owner)
        folder = await self._open_folder()
        await self._threads.catalogue(folder.delete_file, file_id)

    # --- batches ---

    async def create_batch(
        self,
        owner: str,
        *,
        account: str = "",
        endpoint: Url,
        input_file_id: str,
        completion_window: str,
        window_s: int,
        metadata: Mapping[str, str] | None,
        output_expires_after_s: int | None,
    ) -> Batch:
        """Begin a batch. `account`: the name of the key that it counts for.

        Raises `OverloadedError` if the owner has `batch.max_live` of them already.
        """
        try:
            file = await self.file(input_file_id, owner)
        except NotFoundError as exc:
            raise NotFoundError(str(exc), param="input_file_id") from exc
        if file.purpose != "batch":
            raise RequestError(f"the input must be a file of purpose batch, got {file.purpose}", param="input_file_id")
        folder = await self._open_folder()
        now = int(time.time())
        batch = Batch(
            id=new_id("batch_"),
            owner=owner,
            account=account,
            endpoint=endpoint,
            input_file_id=input_file_id,
            completion_window=completion_window,
            expires_at=now + window_s,
            status="validating",
            reached={"validating": now},
            metadata=metadata,
            output_expires_after_s=output_expires_after_s,
        )
        if not await self._threads.catalogue(folder.catalogue.add_batch, batch, max_live=self._config.max_live):
            raise OverloadedError(
                f"{self._config.max_live} batches have not ended yet, more cannot be begun (batch.max_live)",
                retry_after_s=RETRY_AFTER_S,
            )
        self._begin(batch, folder)
        return batch

    async def batch(self, batch_id: str, owner: str) -> Batch:
        folder = await self._existing_folder()
        batch = folder and await self._threads.catalogue(folder.catalogue.batch, batch_id, owner)
        if not batch:
            raise _no_such("batch", batch_id)
        return self._with_counts(batch)

    async def batches(self, owner: str, *, after: str | None, limit: int) -> list[Batch]:
        """Newest first."""
        folder = await self._existing_folder()
        if folder is None:
            return []
        found = await self._threads.catalogue(folder.catalogue.batches, owner, after=after, limit=limit)
        return [self._with_counts(batch) for batch in found]

    async def cancel_batch(self, batch_id: str, owner: str) -> Batch:
        """Raises `ConflictError` if it has ended, or all its rows have."""
        batch = await self.batch(batch_id, owner)
        if (live := self._live.get(batch_id)) is None:
            return cancelled(batch)  # it has ended
        batch = await live.cancel()
        if self._tasks[batch_id].done() and batch.is_live:  # it waits for a new engine; ending it takes none
            self._see_through(live)
        return self._with_counts(batch)

    def _with_counts(self, batch: Batch) -> Batch:
        live = self._live.get(batch.id)
        if live is None or live.counts is None or not batch.is_live:
            return batch
        return replace(batch, total=live.counts.total, completed=live.counts.ok, failed=live.counts.failed)

    # --- at work ---

    def _begin(self, batch: Batch, folder: BatchFolder) -> None:
        account = self._accounts.of_batch(batch.owner, batch.account)
        live = LiveBatch(batch, folder, self._threads, self._hosting, self._metrics, self._turns, self._report, account)
        self._live[batch.id] = live
        if self._is_paused:
            live.pause()
        self._see_through(live)

    def _see_through(self, live: LiveBatch) -> None:
        task = asyncio.create_task(live.see_through())
        self._tasks[live.batch.id] = task
        task.add_done_callback(lambda _: self._rest(live))
        self._report()

    def _rest(self, live: LiveBatch) -> None:
        if not live.batch.is_live:
            self._live.pop(live.batch.id, None)
            self._tasks.pop(live.batch.id, None)
        self._report()

    def _report(self) -> None:
        counts = [live.counts for live in self._live.values() if live.counts is not None]
        self._metrics.observe_batches(
            dict.fromkeys(LIVE, 0) | Counter(live.batch.status for live in self._live.values()),
            pending=sum(count.pending for count in counts),
            completed=sum(count.ok for count in counts),
            failed=sum(count.failed for count in counts),
        )

    # --- the folder ---

    async def _existing_folder(self) -> BatchFolder | None:
        """The folder; None if there is none yet."""
        if self._folder is None and not self._hosting.config.batch_folder.exists():
            return None
        return await self._open_folder()

    async def _open_folder(self) -> BatchFolder:
        """One attempt at a time: who comes while it is made has its outcome."""
        if self._folder is not None:
            return self._folder
        if self._opening is None:
            self._opening = asyncio.create_task(self._opened())
            self._opening.add_done_callback(self._has_tried)
        return await asyncio.shield(self._opening)

    def _has_tried(self, attempt: asyncio.Task[BatchFolder]) -> None:
        self._opening = None
        if not attempt.cancelled():
            attempt.exception()  # is told to those who wait for it, if any still do

    async def _opened(self) -> BatchFolder:
        folder = await self._threads.catalogue(
            BatchFolder.open, self._hosting.config.batch_folder, retention_days=self._config.retention_days
        )
        try:
            live = await self._threads.catalogue(folder.catalogue.live_batches)
        except BaseException:
            await self._threads.catalogue(folder.close)  # or the next attempt meets it as another server's
            raise
        self._folder = folder
        await self._sweep()
        for batch in live:
            self._begin(batch, folder)
        return folder

    async def _sweep(self) -> None:
        if self._folder is not None:
            try:
                await self._threads.catalogue(self._folder.sweep)
            except StorageError as exc:
                logger.warning("what has expired is deleted another day: %s", exc)

    async def _sweep_daily(self) -> None:
        while True:
            await asyncio.sleep(DAY_S)
            await self._sweep()


def _no_such(kind: str, given: str) -> NotFoundError:
    return NotFoundError(f"there is no {kind} {given[:100]!r}", param=f"{kind}_id")
