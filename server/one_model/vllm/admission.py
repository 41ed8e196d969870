"""Requests with mixture keys that make no sense are refused when they come in, with HTTP 400 over vLLM's server.

vLLM lets the classes in its config's `logits_processors` check each request. They are given by name, since the config
travels between processes, and know nothing of the model; so the name itself says what to check against: what stands
behind `V1.` is the directory's members and mixture. No logits are touched.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from ensemble_server.ensembles.base import Mixture
from ensemble_server.server.one_model.vllm.request_mixture import Directory


def admission_name(directory: Directory, *, is_v2_runner: bool) -> str:
    """What to list in `logits_processors` so that requests are checked against `directory`."""
    text = json.dumps({"members": directory.members, "mixture": dataclasses.asdict(directory.mixture)})
    return f"{__name__}:{'V2' if is_v2_runner else 'V1'}.{text.encode().hex()}"


def without_admission(names: Sequence[str | type] | None) -> list[str | type] | None:
    """`names` without those that `admission_name` gave."""
    kept = [name for name in names or () if not (isinstance(name, str) and name.startswith(f"{__name__}:"))]
    return kept or None


class _ByName:
    """Its attributes are classes with a `validate_params` for the directory that the attribute's name spells."""

    def __init__(self, make: Callable[[Directory], type]) -> None:
        self._make = make

    def __getattr__(self, code: str) -> type:
        try:
            found = json.loads(bytes.fromhex(code))
        except ValueError as exc:
            raise AttributeError(code) from exc
        return self._make(Directory(tuple(found["members"]), Mixture(**found["mixture"])))


def _v1(directory: Directory) -> type:
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class Admission(LogitsProcessor):
        def __init__(self, *args: Any) -> None:
            """Never made where `worker.py` serves; vLLM's interface wants the methods."""

        @classmethod
        def validate_params(cls, sampling_params: Any) -> None:
            directory.of_request(sampling_params.extra_args)

        def apply(self, logits: Any) -> Any:
            return logits

        def is_argmax_invariant(self) -> bool:
            return True

        def update_state(self, batch_update: Any) -> None:
            pass

    return Admission


def _v2(directory: Directory) -> type:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

    class Admission(LogitsProcessor):
        @classmethod
        def validate_params(cls, sampling_params: Any) -> None:
            directory.of_request(sampling_params.extra_args)

        def add_request(self, req_idx: int, sampling_params: Any) -> bool:
            return False  # changes no logits

        def apply(self, logits: Any, ctx: Any) -> Any:
            return logits

    return Admission


V1 = _ByName(_v1)
V2 = _ByName(_v2)
