"""A whole batch job in one call, without a server: for a notebook's cell or a script.

`run_batch` may be called anywhere, in a cell of a notebook too (where an event loop is running already);
`run_batch_async` is for code that is asynchronous itself, and for a `Hosting` that stays open from job to job.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import orjson

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.batch.job.identity import Identity, model_fingerprints, needed_part
from ensemble_server.server.batch.job.rows import Row, Url
from ensemble_server.server.batch.job.store import JobStore, job_path
from ensemble_server.server.batch.results.output_line import write_output
from ensemble_server.server.batch.running.failures import FailureWatch
from ensemble_server.server.batch.source.inputs import Recipe, read_rows
from ensemble_server.server.batch.source.records import BadRecord, Record, kind_of_source, read_records
from ensemble_server.server.batch.source.template import PromptTemplate
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.loading import load_config, parse_config

if TYPE_CHECKING:
    from ensemble_server.server.batch.running.runner import Progress, Summary
    from ensemble_server.server.hosting import Hosting

logger = logging.getLogger(__name__)

InputRow = str | Mapping[str, Any] | Row
_URLS_BY_KEY: Mapping[str, Url] = {
    "labels": "/v1/classify",
    "messages": "/v1/chat/completions",
    "prompt": "/v1/completions",
    "input": "/v1/embeddings",
}


@dataclass(frozen=True)
class Answers:
    """The outcome of `run_batch`. `output`: the file of OpenAI batch output lines; gone with this object if none was
    asked for."""

    summary: Summary
    output: Path

    def lines(self) -> Iterator[dict[str, Any]]:
        """The output lines in the input's order: {"id", "custom_id", "response", "error"}."""
        with self.output.open("rb") as lines:
            yield from map(orjson.loads, lines)

    def texts(self) -> Iterator[str | None]:
        """What each row's first choice says (of a classification, its label); None for rows without an answer."""
        for line in self.lines():
            response = line["response"]
            yield None if response is None or line["error"] else _text(response["body"])


def _text(body: Mapping[str, Any]) -> str | None:
    if "choices" not in body:
        return body.get("label")
    [choice, *_] = body["choices"]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def run_batch(
    config: Path | str | Mapping[str, Any] | Config,
    rows: Path | Iterable[InputRow],
    output: Path | str | None = None,
    *,
    model: str | None = None,
    template: str | None = None,
    seed: int = 0,
    concurrency: int | None = None,
    deadline_s: float | None = None,
    retry_errors: bool = False,
    max_errors: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    **parameters: Any,
) -> Answers:
    """`run_batch_async`, for code that is not asynchronous: returns when the job has ended.

    Ctrl-C (in a notebook: interrupt the kernel) keeps what is done; the same call again goes on.
    """
    work = run_batch_async(
        config,
        rows,
        output,
        model=model,
        template=template,
        seed=seed,
        concurrency=concurrency,
        deadline_s=deadline_s,
        retry_errors=retry_errors,
        max_errors=max_errors,
        on_progress=on_progress,
        **parameters,
    )
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    return _in_own_thread(work)


async def run_batch_async(
    config: Path | str | Mapping[str, Any] | Config | Hosting,
    rows: Path | Iterable[InputRow],
    output: Path | str | None = None,
    *,
    model: str | None = None,
    template: str | None = None,
    seed: int = 0,
    concurrency: int | None = None,
    deadline_s: float | None = None,
    retry_errors: bool = False,
    max_errors: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    **parameters: Any,
) -> Answers:
    """Answer all `rows` and write the answers to `output`, in the rows' order.

    `config`: a YAML file, its value as a dict, or a `Config`; an open `Hosting` is used and left open.
    `rows`: the `Path` of an input file (OpenAI batch JSONL, or columns with a `template`), or an iterable. Its items
    are texts (asked as chats), bodies with `messages`, `prompt`, `input` or `labels`, batch lines
    {"custom_id", "url", "body"} or `Row`s; with a Jinja `template`, dicts of columns that it makes prompts of.
    `model` and `parameters` (temperature, max_tokens, ...) go into every body that does not say otherwise. Rows without
    a seed get one from the job's `seed` and their `custom_id`.
    `output`: the job is kept beside it as OUTPUT.job; the same call again goes on where the last one ended, and runs
    failed rows again with `retry_errors`. Without an output nothing is kept.
    `max_errors`: failed rows after which it stops, 0 for never; by default after 20 if none was answered. The summary's
    `ended` is then "failing", and rows that were not run are pending.
    `concurrency`, `deadline_s`, `on_progress`: see `server.batch.running.runner.run`.

    Errors of single rows are in their lines. Raises `ConfigError` for a config, an input or a job that cannot be used,
    `StorageError` where results cannot be written, and `EngineDeadError`.
    """
    if isinstance(config, Path | str | Mapping | Config):
        hosting, settings = None, _config(config)
    else:
        hosting, settings = config, config.config
    recipe = Recipe(
        template=PromptTemplate(template) if template is not None else None,
        defaults=parameters if model is None else {"model": model, **parameters},
    )
    options = {name: json.dumps(value, default=str) for name, value in recipe.defaults.items()}
    if template is not None:
        options["template"] = template
    with ExitStack() as leaving:
        if output is None:
            folder = mkdtemp(prefix="ensemble-batch-")
            leaving.callback(shutil.rmtree, folder, ignore_errors=True)
            path = Path(folder) / "answers.jsonl"
        else:
            path = Path(output)
        with JobStore.open(job_path(path), Identity(options, seed)) as store:
            await asyncio.to_thread(store.take_rows, read_rows(_records(rows, recipe), recipe))
            store.bind_models(model_fingerprints(store.model_names(), settings))  # before minutes go into loading
            if retry_errors:
                store.forget_errors()
            watch = FailureWatch(partial(logger.warning, "%s"), max_errors)
            summary = await _summary(store, settings, hosting, concurrency, deadline_s, on_progress, watch)
            await asyncio.to_thread(write_output, store, path)
            if summary.ended == "failing" and not summary.counts.ok:
                store.forget_errors()  # the output says what became of them; they were spent on nothing
        answers = Answers(summary, path)
        weakref.finalize(answers, leaving.pop_all().close)
    return answers


async def _summary(
    store: JobStore,
    config: Config,
    hosting: Hosting | None,
    concurrency: int | None,
    deadline_s: float | None,
    on_progress: Callable[[Progress], None] | None,
    watch: FailureWatch,
) -> Summary:
    from ensemble_server.server.batch.running.runner import Summary, run

    if not store.num_to_run():  # nothing needs to be loaded
        return Summary("finished", store.counts(), 0, 0, store.spent(), 0.0)
    async with _opened(needed_part(config, store.model_names()), hosting) as opened:
        return await run(
            store, opened, concurrency=concurrency, deadline_s=deadline_s, on_progress=on_progress, watch=watch
        )


@asynccontextmanager
async def _opened(config: Config, hosting: Hosting | None) -> AsyncIterator[Hosting]:
    from ensemble_server.server.hosting import Hosting

    if hosting is not None:
        yield hosting
        return
    async with Hosting.open(config) as opened:
        yield opened


def _config(config: Path | str | Mapping[str, Any] | Config) -> Config:
    match config:
        case Config():
            return config
        case Mapping():
            return parse_config(dict(config), source=Path.cwd() / "config.yaml")
    return load_config(Path(config))


def _records(rows: Path | Iterable[InputRow], recipe: Recipe) -> Iterator[Record | BadRecord]:
    if isinstance(rows, str):
        raise ConfigError(f"rows: give a Path to read a file, or a list of prompts; got the text {rows!r:.60}")
    if isinstance(rows, Path):
        yield from read_records(rows, kind_of_source(rows))
        return
    for line, row in enumerate(rows, start=1):
        yield Record(line, row if recipe.template is not None and isinstance(row, Mapping) else _as_line(row, line))


def _as_line(row: InputRow, line: int) -> Mapping[str, Any]:
    """An item of `rows` as a line of an OpenAI batch file."""
    match row:
        case Row():
            return {"custom_id": row.custom_id, "url": row.url, "body": row.body}
        case str():
            return {"url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": row}]}}
        case Mapping() if "body" in row:
            return {"url": "/v1/chat/completions", **row}
        case Mapping() if key := next((key for key in _URLS_BY_KEY if key in row), None):
            return {"url": _URLS_BY_KEY[key], "body": dict(row)}
    raise ConfigError(
        f"rows: number {line} must be a text, a body with one of {', '.join(_URLS_BY_KEY)}, a batch line with a body,"
        f" or columns for a template; got {row!r:.60}"
    )


def _in_own_thread(work: Coroutine[Any, Any, Answers]) -> Answers:
    """Run `work` in an event loop of its own, beside the one that runs in this thread."""
    tasks: list[asyncio.Task[Any]] = []

    async def watched() -> Answers:
        task = asyncio.current_task()
        assert task is not None, "runs inside a task"
        tasks.append(task)
        return await work

    with ThreadPoolExecutor(1, "batch") as thread:
        future = thread.submit(asyncio.run, watched())
        try:
            return future.result()
        except KeyboardInterrupt:
            for task in tasks:
                task.get_loop().call_soon_threadsafe(task.cancel)
            raise
