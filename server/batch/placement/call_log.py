"""What single models were asked and what they answered, on disk: an ensemble can be run again over it without them.

An entry is known by the model's fingerprint and the whole request, so it outlives the job that made it: the same calls
under another vote, other weights or another judge find their answers here. Time limits, priorities and request ids are
no part of a request here.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import orjson
from pydantic import ConfigDict, TypeAdapter

from ensemble_server.ensembles import errors
from ensemble_server.ensembles.base import Answer, Event, GenerationRequest, Mixture
from ensemble_server.ensembles.errors import EnsembleError, OverloadedError
from ensemble_server.ensembles.text_level import as_delta
from ensemble_server.server.batch.job.job_file import JobFile

_SCHEMA = """
    CREATE TABLE calls (
        key BLOB PRIMARY KEY, model TEXT NOT NULL, request BLOB NOT NULL, answer BLOB, error BLOB
    ) STRICT;
    CREATE INDEX open_calls ON calls (model) WHERE answer IS NULL AND error IS NULL;
"""
_BYTES = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="constants")
_REQUEST = TypeAdapter(GenerationRequest)
_ANSWERS = TypeAdapter(list[Answer], config=_BYTES)  # subtle: a list, since a dataclass itself takes no config here


class NotRecordedError(OverloadedError):
    """This call has no answer yet; it was noted, and can be asked again once the model has been loaded."""


@dataclass(frozen=True)
class Call:
    """A call that waits for its model."""

    key: bytes
    model: str
    request: GenerationRequest


class CallLog:
    """An open log. Methods may be called from any thread.

    with CallLog.open(Path("answers.jsonl.calls")) as log: ...
    """

    def __init__(self, file: JobFile) -> None:
        self._file = file

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises `ConfigError` if another process has it, `StorageError` if it cannot be had."""
        return cls(JobFile(path, _SCHEMA))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def look_up(self, key: bytes) -> Answer | EnsembleError | None:
        """How the call ended; None if it is open or was never noted."""
        with self._file.reading() as db:
            found = db.execute("SELECT answer, error FROM calls WHERE key = ?", (key,)).fetchone()
        if found is None or found == (None, None):
            return None
        return _error_of(found[1]) if found[0] is None else _ANSWERS.validate_json(found[0])[0]

    def note(self, calls: Collection[Call]) -> None:
        """Keep calls to be made; those that are known already stay as they are."""
        rows = [(call.key, call.model, _REQUEST.dump_json(call.request)) for call in calls]
        with self._file.transaction() as db:
            db.executemany("INSERT OR IGNORE INTO calls (key, model, request) VALUES (?, ?, ?)", rows)

    def open_calls(self, models: Sequence[str], *, limit: int) -> list[Call]:
        """Calls of these models that have no answer yet."""
        marks = ", ".join("?" * len(models))
        with self._file.reading() as db:
            page = db.execute(
                f"SELECT key, model, request FROM calls WHERE model IN ({marks}) AND answer IS NULL AND error IS NULL"
                " ORDER BY rowid LIMIT ?",
                (*models, limit),
            ).fetchall()
        return [Call(key, model, _REQUEST.validate_json(request)) for key, model, request in page]

    def num_open(self, models: Sequence[str]) -> int:
        marks = ", ".join("?" * len(models))
        with self._file.reading() as db:
            [number] = db.execute(
                f"SELECT count(*) FROM calls WHERE model IN ({marks}) AND answer IS NULL AND error IS NULL", models
            ).fetchone()
        return number

    def record(self, results: Sequence[tuple[bytes, Answer | EnsembleError]]) -> None:
        """Keep these outcomes, all or none. On disk when this returns."""
        rows = [
            (None, _shown_error(result), key)
            if isinstance(result, EnsembleError)
            else (_ANSWERS.dump_json([result]), None, key)
            for key, result in results
        ]
        with self._file.transaction() as db:
            db.executemany("UPDATE calls SET answer = ?, error = ? WHERE key = ?", rows)

    def forget_errors(self) -> None:
        """Let failed calls be made again."""
        with self._file.transaction() as db:
            db.execute("UPDATE calls SET error = NULL WHERE error IS NOT NULL")


class RecordedModel:
    """An `ensembles.base.Model` that answers from a log. A call that is not there is handed to `note`, and fails.

    `members`, `max_model_len`: of the model that it stands for.
    """

    explains_tokens = False
    fan_out = 1

    def __init__(
        self,
        name: str,
        log: CallLog,
        *,
        fingerprint: str,
        note: Callable[[Call], None],
        members: tuple[str, ...] = (),
        max_model_len: int | None = None,
    ) -> None:
        self.name = name
        self.members = members or (name,)
        self.max_model_len = max_model_len
        self._log = log
        self._fingerprint = fingerprint
        self._note = note

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        """Raises `NotRecordedError` for a call without an answer, and the error of one that failed."""
        asked = replace(request, deadline_s=None, priority=0, request_id="")
        key = hashlib.blake2b(self._fingerprint.encode() + _REQUEST.dump_json(asked), digest_size=16).digest()
        match self._log.look_up(key):
            case None:
                self._note(Call(key, self.name, asked))
                raise NotRecordedError(f"model {self.name!r} has not been asked this yet")
            case EnsembleError() as error:
                raise error
            case Answer() as answer:
                if answer.prompt is not None:
                    yield answer.prompt
                for choice in answer.choices:
                    yield replace(
                        as_delta(choice, index=choice.index),
                        token_ids=tuple(choice.token_ids),
                        tokens=tuple(choice.tokens),
                    )
                yield answer.done


class RecordedDistributions(RecordedModel):
    """Stands for a model that gives next-token distributions, to those who ask it for texts and log-probabilities."""

    explains_tokens = True
    host: Any = None

    @property
    def mixture(self) -> Mixture:
        return Mixture(dict.fromkeys(self.members, 1.0))


def _shown_error(error: EnsembleError) -> bytes:
    """Class, message and the fields that its class gives it."""
    return orjson.dumps({"class": type(error).__name__, "message": str(error), "fields": vars(error)}, default=str)


def _error_of(text: bytes) -> EnsembleError:
    shown: Mapping[str, Any] = orjson.loads(text)
    cls: type[EnsembleError] = getattr(errors, shown["class"], EnsembleError)
    error = cls.__new__(cls, shown["message"])  # not __init__, which words some messages anew
    vars(error).update(shown["fields"])
    return error
