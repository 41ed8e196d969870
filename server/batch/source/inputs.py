"""From the records of a source to the rows of a job: who they are, what they ask, and in which cells of the grid.

A record is either a line of an OpenAI batch file ({"custom_id", "method", "url", "body"}), or columns from which a
template makes the prompt. One that cannot be run becomes a `BadRow` for each cell, so that the output keeps its place.
Everything streams: what is held of rows that have passed are their ids, and those on disk once they are many.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from ensemble_server.ensembles.errors import ConfigError, RequestError
from ensemble_server.server.batch.job.rows import URLS, BadRow, Row, Url
from ensemble_server.server.batch.source.grid import Grid
from ensemble_server.server.batch.source.records import BadRecord, Record
from ensemble_server.server.batch.source.template import PromptTemplate
from ensemble_server.server.config.problems import nearest

GENERATION_URLS = ("/v1/chat/completions", "/v1/completions")
PROMPT_KEYS: Mapping[Url, str] = {"/v1/completions": "prompt", "/v1/embeddings": "input", "/v1/classify": "input"}
OTHER_DEFAULTS: Mapping[Url, tuple[str, ...]] = {"/v1/embeddings": ("model",), "/v1/classify": ("model", "labels")}
LINE_KEYS = ("custom_id", "method", "url", "body")
ID_COLUMNS = ("custom_id", "id")  # looked for in this order where no column is named


@dataclass(frozen=True)
class Recipe:
    """How records become rows.

    `url`: of rows that name none. `template`, `system`: of the prompt and of its system message; without `template`
    records are lines of an OpenAI batch file. `defaults`: keys of a body that its own values go before; bodies that
    generate nothing take only those of `OTHER_DEFAULTS`. `overrides`: dotted keys that are set in every body, whatever
    it says. `grid`: sets its cells' values last.
    """

    url: Url | None = None
    template: PromptTemplate | None = None
    system: PromptTemplate | None = None
    id_column: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    grid: Grid = field(default_factory=Grid)

    def __post_init__(self) -> None:
        if self.system is not None and (self.template is None or self.url not in (None, GENERATION_URLS[0])):
            raise ConfigError("--system goes into chats that --template makes; elsewhere write it into the prompt")

    def request(self, record: Record) -> tuple[Url, dict[str, Any]]:
        """Address and body of a record, before cells. Raises `RequestError`."""
        url, body = self._from_template(record) if self.template is not None else self._from_line(record)
        is_other = url in OTHER_DEFAULTS
        defaults = {k: v for k, v in self.defaults.items() if (k in OTHER_DEFAULTS[url] if is_other else k != "labels")}
        body = {**defaults, **body}
        for path, value in self.overrides.items():
            _set(body, path, value)
        return url, body

    def _from_template(self, record: Record) -> tuple[Url, dict[str, Any]]:
        assert self.template is not None, "asked of recipes with a template only"
        url = self.url or GENERATION_URLS[0]
        prompt = self.template.render(record.values)
        if url != GENERATION_URLS[0]:
            return url, {PROMPT_KEYS[url]: prompt}
        messages = [{"role": "user", "content": prompt}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system.render(record.values)})
        return url, {"messages": messages}

    def _from_line(self, record: Record) -> tuple[Url, dict[str, Any]]:
        values = record.values
        if "body" not in values:
            raise RequestError("there is no body; rows of columns need --template", param="body")
        for name in values:
            if name not in LINE_KEYS:
                raise RequestError(f"unknown field {name!r}{nearest(name, LINE_KEYS)}", param=name)
        if values.get("method", "POST") != "POST":
            raise RequestError(f"method must be POST, got {values['method']!r}", param="method")
        url = values.get("url", self.url)
        if url not in URLS:
            got = "none" if url is None else repr(url)
            raise RequestError(f"url must be one of {', '.join(URLS)}, got {got}", param="url")
        if not isinstance(values["body"], dict):
            raise RequestError(f"body must be an object, got {type(values['body']).__name__}", param="body")
        return url, values["body"]


def read_rows(records: Iterable[Record | BadRecord], recipe: Recipe) -> Iterator[Row | BadRow]:
    """The rows of a job in the output's order: of each record, one for each cell.

    A record without an id gets its number, from 1. One whose id was there before is bad, and says where.
    """
    num_cells = len(recipe.grid.cells)
    with _FirstLines() as first_lines:
        for place, record in enumerate(records):
            custom_id: str | None = None
            try:
                custom_id = _custom_id(record.values, recipe.id_column)
                if isinstance(record, BadRecord):
                    raise RequestError(record.error)
                if custom_id is None:
                    custom_id = str(place + 1)
                if (first := first_lines.note(custom_id, record.line)) is not None:
                    raise RequestError(
                        f"custom_id {custom_id!r} stands in line {first} already; ids must differ", param="custom_id"
                    )
                url, body = recipe.request(record)
            except RequestError as exc:
                for cell in range(num_cells):
                    yield _bad(place * num_cells + cell, custom_id, record.line, exc)
                continue
            for number, cell in enumerate(recipe.grid.cells):
                yield Row(place * num_cells + number, custom_id, url, {**body, **cell})


def _bad(index: int, custom_id: str | None, line: int, error: RequestError) -> BadRow:
    return BadRow(
        index,
        custom_id,
        line,
        {
            "message": f"line {line}: {error}",
            "type": "invalid_request_error",
            "param": error.param,
            "code": "invalid_row",
        },
    )


def _custom_id(values: Mapping[str, Any], column: str | None) -> str | None:
    """The id in a record, as text; None if it has none. Raises `RequestError`."""
    if column is not None and column not in values:
        known = ", ".join(map(str, values)) or "none"
        raise RequestError(f"there is no column {column!r} for the id (there are: {known})", param=column)
    columns = ID_COLUMNS if column is None else (column,)
    found = next((name for name in columns if values.get(name) not in (None, "")), None)
    if found is None:
        return None
    match values[found]:
        case str() as text:
            return text
        case bool():
            pass
        case int() as number:
            return str(number)
        case float() as number if number.is_integer():  # a column of whole numbers with a gap in it, as pandas keeps it
            return str(int(number))
    raise RequestError(f"{found} must be a text or a whole number, got {values[found]!r:.60}", param=found)


def _set(body: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path of `body`, whose own objects are replaced and not changed."""
    *outer, last = path.split(".")
    for key in outer:
        inner = body.get(key)
        body[key] = dict(inner) if isinstance(inner, dict) else {}
        body = body[key]
    body[last] = value


class _FirstLines:
    """custom_id -> the line where it first stood. SQLite moves what does not fit into its cache to a temporary file."""

    def __enter__(self) -> _FirstLines:
        # Not tied to a thread: who gives rows up half way leaves them to the garbage collector, which runs in any.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("CREATE TABLE ids (custom_id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID")
        self._database.execute("BEGIN")
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def note(self, custom_id: str, line: int) -> int | None:
        """The line of an id that was there before, else None."""
        insert = "INSERT INTO ids VALUES (?, ?) ON CONFLICT DO NOTHING"
        if self._database.execute(insert, (custom_id, line)).rowcount:
            return None
        with closing(self._database.execute("SELECT line FROM ids WHERE custom_id = ?", (custom_id,))) as found:
            return found.fetchone()[0]
