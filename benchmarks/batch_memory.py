"""Peak memory of a job of so many rows, each size in a process of its own. The model answers at once and computes
nothing, so what grows is the runner's, the store's and the files'."""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import tempfile
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path

from benchmarks.batch_rows import chat_body
from ensemble_server.ensembles.base import Delta, Done, Event, GenerationRequest, Usage
from ensemble_server.server.batch.job.identity import Identity
from ensemble_server.server.batch.job.rows import Row
from ensemble_server.server.batch.job.store import JobStore
from ensemble_server.server.batch.results.output_line import write_output
from ensemble_server.server.batch.running.runner import run
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.hosting import Hosting
from ensemble_server.server.weights.embeddings import SentenceEmbedder

QUESTION = "Tell me about the history of computing, part {}. " + "Think step by step. " * 40


class Echo:
    """A model that says the end of the question."""

    name = "echo"
    members = ("echo",)
    max_model_len = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        text = request.messages[-1]["content"][-200:]
        yield Delta(0, text, finish_reason="stop")
        yield Done(Usage(0, 0), method="echo", members=self.members, turnout=1)


def measure(sizes: Sequence[int]) -> dict[str, float]:
    """MB at the peak: by the number of rows."""
    peaks = {}
    for num_rows in sizes:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[str(num_rows)] = pool.apply(peak_mb, (num_rows,))
        print(f"{num_rows:7d} rows: {peaks[str(num_rows)]:.0f} MB at the peak", flush=True)
    return peaks


def peak_mb(num_rows: int) -> float:
    """Run a job of `num_rows` rows, from their bodies to the output file, and say how much memory this process took."""
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_job(num_rows, Path(folder)))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def _job(num_rows: int, folder: Path) -> None:
    config = parse_config({"models": {"echo": {"url": "http://127.0.0.1:9/v1", "model": "echo"}}}, source=folder / "c")
    embedder = SentenceEmbedder(config.embedding.path, batch_size=1)  # loads nothing until it is asked
    hosting = Hosting(config, {"echo": Echo()}, {}, None, embedder)
    with JobStore.open(folder / "answers.job", Identity({})) as store:
        store.take_rows(_rows(num_rows))
        summary = await run(store, hosting)
        assert summary.counts.ok == num_rows, f"{summary.counts.failed} rows failed"
        write_output(store, folder / "answers.jsonl")


def _rows(num_rows: int) -> Iterator[Row]:
    for index in range(num_rows):
        yield Row(index, str(index), "/v1/chat/completions", chat_body("echo", QUESTION.format(index), 64))
