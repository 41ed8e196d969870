"""What a file on the command line must be, told before anything else is done: exit code 2 for what no command can read.

A pipe of the shell's own (`<(...)`, /dev/stdin) is read like a file. A named one is not: a command that opens it waits
until somebody writes, and most read their files twice.
"""

from __future__ import annotations

import codecs
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import typer

BEGINNING_BYTES = 4096  # that are looked at

Given = TypeVar("Given", Path | None, list[Path] | None)


def check_readable(path: Path, param: str) -> None:
    """Raise `typer.BadParameter` for a path that is there and is no file to be read."""
    if (problem := problem_of(path)) is not None:
        raise typer.BadParameter(problem, param_hint=param)


def check_text(path: Path, param: str) -> None:
    """The same for a config, a plan or another text, which is UTF-8 and not empty."""
    if (problem := problem_of(path) or _problem_of_text(path)) is not None:
        raise typer.BadParameter(problem, param_hint=param)


def readable(value: Given) -> Given:
    """As the callback of an argument or an option."""
    return _checked(value, problem_of)


def text_file(value: Given) -> Given:
    """The same for a text."""
    return _checked(value, lambda path: problem_of(path) or _problem_of_text(path))


def problem_of(path: Path) -> str | None:
    """Why a path that is there cannot be read as a file; None if it can, or is not there, or is standard input."""
    if str(path) == "-" or str(path).startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/")):
        return None
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    except OSError as exc:
        return f"{path} cannot be read ({exc.strerror or exc})"
    for is_kind, kind in _NO_FILES.items():
        if is_kind(mode):
            return f"{path} is {kind}, and no file"
    return None if os.access(path, os.R_OK) else f"{path} may not be read by this user (permission denied)"


_NO_FILES: dict[Callable[[int], bool], str] = {
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def _problem_of_text(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        beginning = file.read(BEGINNING_BYTES)
    if not beginning.strip():
        return f"{path} is empty"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(beginning, len(beginning) < BEGINNING_BYTES)
    except UnicodeDecodeError as exc:
        return f"{path} must be UTF-8 text, byte {exc.start} is not"
    return f"{path} is no text: it holds bytes of value zero" if b"\0" in beginning else None


def _checked(value: Given, problem_with: Callable[[Path], str | None]) -> Given:
    paths: Sequence[Path] = [value] if isinstance(value, Path) else value or []
    for path in paths:
        if (problem := problem_with(path)) is not None:
            raise typer.BadParameter(problem)
    return value


def check_target(target: str, param: str = "CONFIG") -> None:
    """Raise `typer.BadParameter` for a target of `serve` or `chat` that is there and can be no config and no model."""
    from ensemble_server.server.proposal.targets import is_config

    path = Path(target)
    if "://" in target:
        return
    (check_text if is_config(target) else check_readable)(path, param)
    if path.is_dir() and not any(path.iterdir()):
        raise typer.BadParameter(f"{target} is an empty folder", param_hint=param)
