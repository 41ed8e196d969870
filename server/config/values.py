"""The values that keys of the config take: what each must look like, and what it is turned into.

What exists on disk or on the hub is not looked at here (that is `server.weights.checkpoints`), so that a config can be
checked on another machine than the one that serves it. The exception is the text of a template file.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from ensemble_server.server.config.credentials import without_credentials
from ensemble_server.server.config.problems import nearest

ENGINE_KINDS = ("transformers", "vllm")
SPECULATION = ("off", "text", "member")

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[^\s/?#@:*\[\]]+|\[[0-9a-f:.]+\])(?::\d{1,5})?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def absolute(path: str, info: ValidationInfo) -> str:
    """The path as seen from the config's folder; as it is where no folder is known (a block made in code)."""
    folder = (info.context or {}).get("folder")
    return path if folder is None else os.path.abspath(folder / Path(path).expanduser())


def _absolute_unless_hub_id(path: str, info: ValidationInfo) -> str:
    """ "org/name" and "name" are hub ids unless there is such a file or folder; all else is a path."""
    place = absolute(path, info)
    if _HUB_ID.fullmatch(path) and not path.endswith(".gguf") and not os.path.exists(place):
        return path
    return place


def _template_text(value: str, info: ValidationInfo) -> str:
    """The template itself; read from its file if `value` is the path of one, whatever its ending.

    A text with nothing of Jinja in it would send the same prompt whatever the client asks, so it can only be a path.
    """
    if "\n" in value or any(mark in value for mark in ("{{", "{%", "{#")):
        return value
    try:
        return Path(absolute(value, info)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ValueError(
            f"the template file {value!r} cannot be read ({exc}); a template that is no file has {{{{ }}}} in it"
        ) from exc


def _base_url(url: str) -> str:
    """An http(s) address without a slash at its end."""
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ValueError(
            f'must be an http(s) address such as "http://127.0.0.1:9000/v1", got {without_credentials(url)!r}'
        )
    return url.rstrip("/")


def _origin(origin: str) -> str:
    """As browsers write it: " HTTP://LocalHost:80/" -> "http://localhost". Raises for what no page's origin can be."""
    if origin == "*":
        return origin
    written = origin.strip().lower().rstrip("/")
    if written == "null":
        raise ValueError("'null' is the origin of every page that hides its own; serve that page from an address")
    if not _ORIGIN.fullmatch(written):
        raise ValueError(
            'must be origins as browsers send them, a scheme and a host, such as "https://example.org" or '
            f'"http://localhost:5173", or "*", got {without_credentials(origin)!r}'
        )
    port = _DEFAULT_PORTS.get(written.partition("://")[0])
    return written if port is None else written.removesuffix(f":{port}")


def _variable_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("must be the name of an environment variable, not its value")
    return name


def _device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", device):
        raise ValueError(f"must be auto, cpu, cuda, cuda:N, mps, xpu or xpu:N, got {device!r}")
    return device


def _engine_kind(kind: Any) -> Any:
    if kind not in ENGINE_KINDS:
        raise ValueError(f"must be one of {', '.join(ENGINE_KINDS)}, got {kind!r}{nearest(str(kind), ENGINE_KINDS)}")
    return kind


@dataclass(frozen=True)
class Unit:
    """What a number counts, for the reference of keys. Keys that end in `_s` or `_bytes` say it themselves."""

    name: str


CheckpointPath = Annotated[str, Field(min_length=1), AfterValidator(_absolute_unless_hub_id)]
LocalPath = Annotated[str, Field(min_length=1), AfterValidator(absolute)]
TemplateText = Annotated[str, AfterValidator(_template_text)]
Origin = Annotated[str, AfterValidator(_origin)]
BaseUrl = Annotated[str, AfterValidator(_base_url)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Annotated[str, AfterValidator(_device)]
EmbeddedEngine = Annotated[Literal["transformers"], BeforeValidator(_engine_kind)]
VariableName = Annotated[str, AfterValidator(_variable_name)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Tokens = Annotated[Count, Unit("tokens")]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False), Unit("currency per million tokens")]


def _off(value: Any) -> Any:
    return "off" if value is False else value


def _speculation(value: Any) -> Any:
    if (value := _off(value)) not in SPECULATION:
        raise ValueError(f"must be one of {', '.join(SPECULATION)}, got {value!r}{nearest(str(value), SPECULATION)}")
    return value


# YAML 1.1 reads a bare `off` as false.
Reasoning = Annotated[Literal["auto", "off"], BeforeValidator(_off)]
Speculation = Annotated[Literal["off", "text", "member"], BeforeValidator(_speculation)]
