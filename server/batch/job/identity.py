"""What makes a job the same job when its command is run again, and names in it that no clock has touched.

A row without a seed gets one, and an answer's ids are hashes of what was asked. So a job that was killed and resumed
writes the bytes that an uninterrupted one writes, with the reservations that `server.batch.running.runner` makes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from ensemble_server.ensembles.text_level import derived_seed
from ensemble_server.server.batch.job.rows import Row
from ensemble_server.server.config.excerpt import excerpt
from ensemble_server.server.config.fingerprints import fingerprint

if TYPE_CHECKING:
    from ensemble_server.server.config.blocks import Config

UNSEEDED = frozenset({"/v1/embeddings", "/v1/classify"})  # nothing is drawn for these


@dataclass(frozen=True)
class Identity:
    """What must be the same whenever a job is continued, each thing under the name that a user knows it by.

    `{"input": "rows.jsonl", "--template": "…"}`. Rows are compared one by one anyway (`JobStore.take_rows`); parts say
    in a user's words why they differ. What may change from run to run (how many rows run at once, a deadline) does not
    belong here. `seed` is the job's: rows without one get theirs from it.
    """

    parts: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    def changes_to(self, other: Identity) -> list[str]:
        """What `other` has otherwise: ["--template was 'a', is now 'b'"]"""
        before = dict(self.parts) | {"the job's seed": str(self.seed)}
        after = dict(other.parts) | {"the job's seed": str(other.seed)}
        return [
            f"{name} was {_quoted(before.get(name))}, is now {_quoted(after.get(name))}"
            for name in before | after
            if before.get(name) != after.get(name)
        ]


def _quoted(value: str | None) -> str:
    if value is None:
        return "not given"
    return repr(value if len(value) <= 100 else f"{value[:99]}…")


def model_fingerprints(names: Iterable[str | None], config: Config) -> dict[str, str]:
    """The fingerprints of those models among `names` that the config has; None is its only listed one."""
    named = {config.listed[0] if name is None and len(config.listed) == 1 else name for name in names}
    return {name: fingerprint(name, config) for name in config.models if name in named}


def needed_part(config: Config, names: Collection[str | None]) -> Config:
    """What rows that name these models need of `config`, so that nothing else is loaded.

    All of it where a row names a model that it lacks, or none where it has several: what such a row is told says which
    models there are.
    """
    if None in names and len(config.listed) != 1:
        return config
    if any(name is not None and name not in config.models for name in names):
        return config
    return excerpt(config, model_fingerprints(names, config))


def encoded_body(body: Mapping[str, Any]) -> bytes:
    """`body` as JSON in UTF-8, keys in their order (a JSON schema's order is the order of what is generated).

    Raises `ValueError` for what JSON cannot say: NaN, infinities, halves of surrogate pairs, Python objects.
    """
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, RecursionError) as exc:
        raise ValueError(str(exc)) from exc


def body_digest(row: Row) -> bytes:
    """16 bytes: a hash of what is asked, and of nothing else."""
    return hashlib.blake2b(row.url.encode() + b"\0" + encoded_body(row.body), digest_size=16).digest()


def shared_digest(row: Row) -> bytes | None:
    """`body_digest` for rows that have the same answer whenever they are asked (nothing is drawn, at temperature 0, or
    with a seed of their own); None for all others."""
    repeats = row.url in UNSEEDED or row.body.get("seed") is not None or _is_greedy(row.body)
    return body_digest(row) if repeats else None


def seeded(row: Row, job_seed: int) -> Row:
    """`row` with a seed, the same at every run: its own, or one from the job's seed and its `custom_id`.

    Rows at temperature 0 get one from their body instead: equal ones are then still equal.
    """
    if row.url in UNSEEDED or row.body.get("seed") is not None:
        return row
    own = body_digest(row).hex() if _is_greedy(row.body) else row.custom_id
    return replace(row, body={**row.body, "seed": derived_seed(job_seed, own)})


def _is_greedy(body: Mapping[str, Any]) -> bool:
    temperature = body.get("temperature")
    return isinstance(temperature, int | float) and not isinstance(temperature, bool) and temperature == 0


def ids_from(digest: bytes) -> Callable[[], str]:
    """A function that gives 32 hex digits, others at every call and the same ones at every run; first the digest's."""
    places = count()

    def new_id() -> str:
        place = next(places)
        return hashlib.blake2b(digest + str(place).encode(), digest_size=16).hexdigest() if place else digest.hex()

    return new_id
