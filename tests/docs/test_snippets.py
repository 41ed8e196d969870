"""Python and commands of the pages: what a test runs names it, what none runs says why, and all the rest is at least
whole: it compiles, and what it imports from this package is there. Commands are held to the program by
`test_commands.py`.
"""

from __future__ import annotations

import ast
import importlib
import shlex
from collections.abc import Iterator

import pytest

from tests.docs.snippets import PAGES, ROOT, Snippet, snippets

MIN_REASON_CHARS = 8
SNIPPETS = [snippet for page in PAGES for snippet in snippets(page) if snippet.kind in ("python", "shell")]


def programs(snippet: Snippet) -> Iterator[ast.Module]:
    """The Python of a snippet: itself, or what its commands give to `python -c`."""
    if snippet.kind == "python":
        yield _parsed(snippet.text)
        return
    for command in snippet.commands:
        words = shlex.split(command, comments=True)
        if words[:2] == ["python", "-c"]:
            yield _parsed(words[2])


def _parsed(code: str) -> ast.Module:
    return compile(code, "snippet", "exec", flags=ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_a_mark_names_a_test_or_a_reason(snippet: Snippet) -> None:
    match snippet.mark:
        case ("run by", test):
            assert (ROOT / test).is_file(), f"there is no {test}"
        case ("not run", reason):
            assert len(reason) >= MIN_REASON_CHARS, "say why"
        case mark:
            assert mark is None, "code is run by a test, or not run for a reason"


@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_python_compiles_and_what_it_imports_from_this_package_is_there(snippet: Snippet) -> None:
    for program in programs(snippet):
        for node in ast.walk(program):
            match node:
                case ast.ImportFrom(module=str() as module, names=names) if module.startswith("ensemble_server"):
                    found = importlib.import_module(module)
                    assert [name.name for name in names if not hasattr(found, name.name)] == [], module
                case ast.Import(names=names):
                    for name in names:
                        if name.name.startswith("ensemble_server"):
                            importlib.import_module(name.name)
                        assert name.name.partition(".")[0] not in ("server", "ensembles"), "has another name now"
                case ast.ImportFrom(module=str() as module):
                    assert module.partition(".")[0] not in ("server", "ensembles"), "has another name now"
