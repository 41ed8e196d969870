"""Prompts from the columns of a row: a Jinja template, in a sandbox and strict about columns that are not there.

A null is blank, as an empty cell of a CSV is. A column whose name is no identifier is `row["its name"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import isroutine
from pathlib import Path
from typing import Any, Self

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ensemble_server.ensembles.errors import ConfigError, RequestError

ROW = "row"  # the name under which a template has all columns, unless a column is called so


class _Columns(dict[str, Any]):
    """What `row` is in a template."""


class _NamedUndefined(StrictUndefined):
    """A column that is not there: whatever a template does with it but ask whether it is defined is an error."""

    @property
    def _undefined_message(self) -> str:
        if isinstance(self._undefined_obj, Mapping):
            kind = "column" if isinstance(self._undefined_obj, _Columns) else "key"
            return f"there is no {kind} {self._undefined_name!r} (there are: {_listed(self._undefined_obj)})"
        return super()._undefined_message


class _Environment(ImmutableSandboxedEnvironment):
    """Keys of a mapping go before its methods: `row.items` is the column, and the method only where there is none."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, Mapping) and attribute in obj:
            return obj[attribute]
        found = super().getattr(obj, attribute)
        return _Method(found, attribute) if isroutine(found) else found


class _Method:
    """A method of a value, to be called. As text it is an error: Python would write its address into the prompt."""

    def __init__(self, method: Callable[..., Any], name: str) -> None:
        self._method = method
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(*args, **kwargs)

    def __str__(self) -> str:
        raise _no_text(self._name)


def _no_text(name: str) -> UndefinedError:
    return UndefinedError(f"there is no column or key {name!r}, and the function of that name is no text; call it")


class PromptTemplate:
    """Text with `{{ column }}` in it. `name` says in errors where it came from."""

    def __init__(self, source: str, *, name: str = "template") -> None:
        """Raises `ConfigError` if `source` is not Jinja."""
        self.name = name
        self.source = source
        environment = _Environment(
            undefined=_NamedUndefined, finalize=_printable, autoescape=False, keep_trailing_newline=False
        )
        try:
            self._template: Template = environment.from_string(source)
        except TemplateSyntaxError as exc:
            raise ConfigError(f"{name}, line {exc.lineno}: not a Jinja template: {exc.message}") from exc

    @classmethod
    def read(cls, text: str, *, name: str = "template") -> Self:
        """The template in the file called `text`, or `text` itself if it holds `{{` or `{%`. Raises `ConfigError`."""
        if "{{" in text or "{%" in text:
            return cls(text, name=name)
        path = Path(text)
        try:
            return cls(path.read_text(encoding="utf-8"), name=str(path))
        except OSError as exc:
            raise ConfigError(
                f"{name}: {text!r} is neither a file that can be read ({exc.strerror or exc}) nor a text "
                "with a {{ column }} in it"
            ) from exc
        except UnicodeDecodeError as exc:
            raise ConfigError(f"{path}: must be UTF-8 text, byte {exc.start} is not") from exc

    def render(self, columns: Mapping[str, Any]) -> str:
        """The prompt of a row. Raises `RequestError` that names the column that is missing, or what else failed."""
        try:
            return self._template.render({ROW: _Columns(columns), **columns})
        except UndefinedError as exc:
            raise RequestError(f"{self.name}: {_with_columns(exc, columns)}", param="template") from exc
        except Exception as exc:  # templates are programs: they raise whatever their filters and their data make them
            raise RequestError(f"{self.name}: {type(exc).__name__}: {exc}", param="template") from exc


def _printable(value: Any) -> Any:
    """What `{{ value }}` writes. Raises `UndefinedError` for a function."""
    if value is None:
        return ""
    if isroutine(value) or isinstance(value, type):
        raise _no_text(value.__name__.removeprefix("safe_"))  # as Jinja calls its own
    return value


def _with_columns(error: UndefinedError, columns: Mapping[str, Any]) -> str:
    """Jinja's "'x' is undefined" is about a name at the top, which can only be a column."""
    message = str(error)
    if message.endswith("' is undefined"):
        return f"there is no column {message.removesuffix(' is undefined')} (there are: {_listed(columns)})"
    return message


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(map(str, names)) or "none"
