"""What the options of `ensemble batch` say of requests. A wrong one is a `typer.BadParameter` that names it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from ensemble_server.server.batch.source.grid import Grid
    from ensemble_server.server.config.blocks import Config

T = TypeVar("T")

MAX_SHOWN_CHARS = 80


@dataclass(frozen=True)
class RequestOptions:
    """What goes into the rows' bodies, as the command line has it; None and () for options that were not given."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: str | None = None
    top_p: float | None = None
    seeds: str | None = None
    samples: int | None = None
    stop: Sequence[str] = ()
    stop_when_decided: str | None = None
    response_format: str | None = None
    labels: str | None = None
    set: Sequence[str] = ()

    def check_models(self, config: Config) -> None:
        """Refuse models that the config does not have."""
        from ensemble_server.server.config.problems import nearest

        for name in self.axes().get("model", ()):
            if name not in config.models:
                raise typer.BadParameter(
                    f"{config.source} has no model {name!r}{nearest(name, config.models)}", param_hint="--model"
                )

    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Every key of a body for which values were given, with all of them; those with several span the grid."""
        from ensemble_server.server.batch.source.grid import parse_numbers, parse_seeds, parse_words

        values = {
            "model": parsed("--model", parse_words, self.model),
            "temperature": parsed("--temperature", lambda text: parse_numbers(text, least=0, most=2), self.temperature),
            "seed": parsed("--seeds", parse_seeds, self.seeds),
        }
        return {key: found for key, found in values.items() if found}

    def grid(self) -> Grid:
        from ensemble_server.server.batch.source.grid import Grid

        try:
            return Grid({key: values for key, values in self.axes().items() if len(values) > 1})
        except ValueError as exc:
            raise typer.BadParameter(str(exc)) from exc

    def defaults(self) -> dict[str, Any]:
        """What fills a body that does not say otherwise."""
        single = {key: values[0] for key, values in self.axes().items() if len(values) == 1}
        plain = {
            "max_tokens": self.max_tokens,
            "top_p": self.top_p,
            "n": self.samples,
            "stop": list(self.stop) or None,
            "stop_when_decided": self.stop_when_decided,
            "labels": parsed("--labels", parse_labels, self.labels),
            "response_format": parsed("--response-format", parse_response_format, self.response_format),
        }
        return single | {key: value for key, value in plain.items() if value is not None}

    def overrides(self) -> dict[str, Any]:
        """What every body gets, whatever it says."""
        return dict(parsed("--set", parse_setting, text) for text in self.set)

    def stated(self) -> dict[str, str]:
        """The options that were given, as text, for a job to be held to."""
        plain = {f"--{name.replace('_', '-')}": getattr(self, name) for name in self.__dataclass_fields__}
        return {flag: summarised(value) for flag, value in plain.items() if value not in (None, (), [])}


def parsed(flag: str, parse: Callable[[str], T], text: str | None) -> Any:
    """`parse(text)`, or None without a text."""
    if text is None:
        return None
    try:
        return parse(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint=flag) from exc


def parse_setting(text: str) -> tuple[str, Any]:
    """ "ensemble.explain=true" -> ("ensemble.explain", True). Raises `ValueError`."""
    path, has_value, value = text.partition("=")
    if not has_value or not all(path.split(".")):
        raise ValueError(f"must be KEY=JSON, got {text!r}")
    try:
        return path, json.loads(value, parse_constant=_refuse)
    except ValueError as exc:
        raise ValueError(f"{path}: {value!r} is not JSON ({exc}); a text needs quotes: '{path}=\"...\"'") from exc


def parse_labels(text: str) -> list[str]:
    """ "good,bad" or, for labels with commas in them, '["yes, sir", "no"]' -> a list. Raises `ValueError`."""
    if not text.lstrip().startswith("["):
        return text.split(",")
    labels = json.loads(text)
    if not all(isinstance(label, str) for label in labels):
        raise ValueError(f"must be texts, got {text}")
    return labels


def parse_response_format(text: str) -> dict[str, Any]:
    """A kind ("json_object"), a `response_format` object, or a JSON schema; the last two also as the name of a file.

    Raises `ValueError`.
    """
    if text in ("text", "json_object"):
        return {"type": text}
    source = text
    if not text.lstrip().startswith("{"):
        try:
            source = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise ValueError(f"must be json_object, JSON, or a file of JSON; {text!r} is none ({exc})") from exc
    try:
        value = json.loads(source, parse_constant=_refuse)
    except ValueError as exc:
        raise ValueError(f"is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, got {type(value).__name__}")
    if value.get("type") in ("text", "json_object", "json_schema"):
        return value
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": value}}


def summarised(value: Any) -> str:
    """A value as an error can show it: short texts as they are, long ones by their hash."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= MAX_SHOWN_CHARS and "\n" not in text:
        return text
    return f"{len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")
