"""The life of one batch, from validating to its end; every step can be cut off anywhere and taken up again.

    validating ──> in_progress ──> finalizing ──> completed | expired | failed
        │  └──────────────┴──────> cancelling ──> cancelled
        └──> failed

The catalogue says how far it is, the job's own file which rows are done. A step is done again if a crash ended it: rows
are taken in and result files written as a whole or not at all, and no row that has an answer is asked twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from ensemble_server.ensembles.errors import (
    ConfigError,
    ConflictError,
    EngineDeadError,
    OverloadedError,
    StorageError,
)
from ensemble_server.server.batch.job.identity import Identity
from ensemble_server.server.batch.job.job_file import DamagedJobError
from ensemble_server.server.batch.job.rows import Row, RowResult
from ensemble_server.server.batch.job.store import Counts, JobStore
from ensemble_server.server.batch.running.answering import answer
from ensemble_server.server.batch.running.runner import Progress, run
from ensemble_server.server.batch.uploads.catalogue import Batch, LineError, Status, StoredFile
from ensemble_server.server.batch.uploads.disk_threads import DiskThreads
from ensemble_server.server.batch.uploads.folder import BatchFolder
from ensemble_server.server.batch.uploads.result_files import ResultFiles, write_result_files
from ensemble_server.server.batch.uploads.turns import Turns
from ensemble_server.server.batch.uploads.validation import Findings, checked_file, rows_of
from ensemble_server.server.limits.spending import Spending
from ensemble_server.server.requests.classify import Priors
from ensemble_server.server.requests.errors import error_object

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting
    from ensemble_server.server.limits.account import Account
    from ensemble_server.server.metrics import Metrics

logger = logging.getLogger(__name__)

RETRY_S = 60.0  # until a batch that met a full disk is tried again
MODEL_CHANGED = LineError(
    "model_changed",
    "the server was restarted with other models than this batch began with; rows that had been answered are in the"
    " output file, send the others again",
)
ROWS_GONE = LineError("server_error", "the server has lost the rows of this batch; send it again")


class LiveBatch:
    """A batch that has not ended. `see_through` is its task; `counts` is how far it is, once its rows are known."""

    def __init__(
        self,
        batch: Batch,
        folder: BatchFolder,
        threads: DiskThreads,
        hosting: Hosting,
        metrics: Metrics,
        turns: Turns,
        on_change: Callable[[], None],
        account: Account,
    ) -> None:
        self.batch = batch
        self.counts: Counts | None = None
        self._folder = folder
        self._threads = threads
        self._hosting = hosting
        self._metrics = metrics
        self._turns = turns
        self._on_change = on_change
        self._account = account
        self._stop = asyncio.Event()
        self._is_paused = False

    def pause(self) -> None:
        """Stop soon and keep what is done; rows in flight are asked again when the batch goes on."""
        self._is_paused = True
        self._stop.set()

    async def cancel(self) -> Batch:
        """Ask for its end; `see_through` brings it about. Raises `ConflictError` if it is too late."""
        await self._change(cancelled)
        self._stop.set()
        return self.batch

    async def see_through(self) -> None:
        """Bring the batch to its end. If it is paused or the engine dies, it is left for the next server to go on."""
        while not self._is_paused:
            try:
                await self._next_steps()
                return
            except EngineDeadError as exc:
                if self.batch.status == "in_progress":
                    logger.error("batch %s waits for a restart of the server: %s", self.batch.id, exc)
                    return
            except DamagedJobError as exc:  # waiting mends nothing
                await self._give_up(exc)
                return
            except (StorageError, ConfigError) as exc:
                if time.time() > self.batch.expires_at:
                    await self._give_up(exc)
                    return
                logger.error("batch %s is tried again in %g s: %s", self.batch.id, RETRY_S, exc)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), RETRY_S)
                self._stop.clear()  # a cancelled batch tries at once, and then waits like others
            except Exception as exc:
                await self._give_up(exc)
                return

    async def _next_steps(self) -> None:
        if self.batch.status == "validating":
            await self._validate()
        if not self.batch.is_live:
            return
        job = await self._threads.work(self._open_job)
        try:
            self.counts = job.counts()
            self._on_change()
            errors: tuple[LineError, ...] = ()
            if not job.is_complete:
                errors = (ROWS_GONE,)
            elif self.batch.status == "in_progress":
                try:
                    await self._run(job)
                except DamagedJobError:
                    raise
                except ConfigError as exc:
                    logger.error("batch %s cannot go on: %s", self.batch.id, exc)
                    errors = (MODEL_CHANGED,)
            if self._is_paused and self.batch.status == "in_progress" and not errors:
                return
            await self._finish(job, errors)
        finally:
            await self._threads.work(job.close)
        await self._threads.work(self._folder.delete_job, self.batch.id)

    def _open_job(self) -> JobStore:
        identity = Identity({"batch": self.batch.id}, seed=self.batch.seed)
        return JobStore.open(self._folder.job_path(self.batch.id), identity)

    async def _validate(self) -> None:
        """Check the input file and take its rows in."""
        max_rows = self._hosting.config.batch.max_rows
        path = self._folder.file_path(self.batch.input_file_id)
        try:
            found = await self._threads.work(checked_file, path, self.batch.endpoint, max_rows=max_rows)
        except FileNotFoundError:
            gone = LineError("file_not_found", "the input file was deleted before it had been read", "input_file_id")
            found = Findings(0, (gone,), None)
        except OSError as exc:
            raise StorageError(f"the input file cannot be read: {exc.strerror or exc}") from exc
        if found.errors:
            await self._change(partial(_failed, errors=found.errors))
            return

        def take_rows() -> None:
            with self._open_job() as job:
                job.take_rows(rows_of(path, self.batch.endpoint))

        await self._threads.work(take_rows)
        await self._change(partial(_begun, found=found))

    async def _run(self, job: JobStore) -> None:
        """Wait for a place and answer rows, until all are done, the batch expires, or it is asked to stop."""
        running = asyncio.create_task(self._run_in_turn(job))
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            running.cancel()
            stopping.cancel()
            await asyncio.gather(running, stopping, return_exceptions=True)
        if not running.cancelled():
            running.result()

    async def _run_in_turn(self, job: JobStore) -> None:
        left_s = self.batch.expires_at - time.time()
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, left_s)) as waiting, self._turns.place(self.batch.owner):
                waiting.reschedule(None)  # from here on the run itself heeds the time
                await run(
                    job,
                    self._account.house(self._hosting),
                    deadline_s=self.batch.expires_at - time.time(),
                    answer=partial(self._answer, priors=Priors()),
                    on_progress=self._note,
                    say=partial(logger.warning, "batch %s: %s", self.batch.id),
                )

    async def _answer(self, hosting: Hosting, row: Row, **how: Any) -> RowResult:
        """A row counts for its key as a request over HTTP does; where that would be refused, `RateLimitError` is raised
        and the row waits."""
        self._account.admit()
        try:
            return await answer(hosting, row, new_observer=self._new_observer, **how)
        except OverloadedError:
            self._account.take_back()
            raise

    def _new_observer(self) -> Spending:
        return Spending(self._account, self._metrics.generation_meter())

    def _note(self, progress: Progress) -> None:
        self.counts = progress.counts
        self._on_change()

    async def _finish(self, job: JobStore, errors: tuple[LineError, ...]) -> None:
        """Write the result files and end the batch. `errors`: why it cannot go on, if that is how it ends."""
        await self._change(partial(_finalizing, errors=errors))
        counts = job.counts()
        end: Status = "completed"
        if self.batch.status == "cancelling":
            end = "cancelled"
        elif self.batch.errors:
            end = "failed"
        elif counts.pending or counts.cut:
            end = "expired"
        written = await self._threads.work(write_result_files, job, self._folder, self.batch, end)
        await self._change(partial(_ended, end=end, written=written), new_files=written.files)

    async def _give_up(self, exc: Exception) -> None:
        """End a batch that this server cannot bring to its end."""
        logger.error("batch %s has failed: %s", self.batch.id, exc, exc_info=exc)
        with suppress(StorageError):  # then the next server comes to the same end
            await self._change(partial(_failed, errors=(_told(exc),)))
            await self._threads.work(self._folder.delete_job, self.batch.id)

    async def _change(self, change: Callable[[Batch], Batch], new_files: Sequence[StoredFile] = ()) -> None:
        self.batch = await self._threads.catalogue(
            self._folder.catalogue.change_batch, self.batch.id, change, new_files=new_files
        )
        self._on_change()


def _told(exc: Exception) -> LineError:
    """What a client is told. Errors of the job's file name its path, which is for the log alone."""
    if isinstance(exc, DamagedJobError):
        return ROWS_GONE
    if isinstance(exc, StorageError | ConfigError):
        return LineError("server_error", "the server cannot keep the rows of this batch; its log has the cause")
    return LineError("server_error", error_object(exc)[1]["message"])


# --- from one status to the next ---------------------------------------------------------------------------------


def cancelled(batch: Batch) -> Batch:
    """The batch once a client has cancelled it. Raises `ConflictError` if it is too late."""
    if batch.status in ("cancelling", "cancelled"):
        return batch
    if batch.status in ("validating", "in_progress"):
        return batch.moved("cancelling")
    raise ConflictError(f"batch {batch.id} cannot be cancelled any more: it is {batch.status}")


def _begun(batch: Batch, found: Findings) -> Batch:
    status: Status = "in_progress" if batch.status == "validating" else batch.status  # cancelled meanwhile
    return batch.moved(status, total=found.num_rows, model=found.model)


def _finalizing(batch: Batch, errors: tuple[LineError, ...]) -> Batch:
    return batch if batch.status in ("cancelling", "finalizing") else batch.moved("finalizing", errors=errors)


def _failed(batch: Batch, errors: tuple[LineError, ...]) -> Batch:
    return batch.moved("failed", errors=errors)


def _ended(batch: Batch, end: Status, written: ResultFiles) -> Batch:
    return batch.moved(
        end,
        completed=written.completed,
        failed=written.failed,
        input_tokens=written.input_tokens,
        output_tokens=written.output_tokens,
        output_file_id=written.output and written.output.id,
        error_file_id=written.errors and written.errors.id,
    )
