"""Every command line of `ensemble` that a page shows names a command and options that there are, run or not."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import typer

from ensemble_server.server.cli.app import COMMANDS, app
from tests.docs.snippets import PAGES, ROOT, Snippet, snippets

SNIPPETS = [snippet for page in PAGES for snippet in snippets(page) if snippet.kind == "shell"]


def options_of(command: str) -> set[str]:
    group = typer.main.get_command(app)
    named = group.commands[command] if command else group  # type: ignore[attr-defined]
    return {option for parameter in named.params for option in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_commands_and_options_are_there(snippet: Snippet) -> None:
    for line in snippet.commands:
        words = shlex.split(line, comments=True)
        if words[0] != "ensemble":
            continue
        name = next((name for name in (" ".join(words[1:3]), words[1]) if name in COMMANDS), "")
        assert name or words[1].startswith("--"), f"there is no command {words[1]!r}"
        given = {word.partition("=")[0] for word in words if word.startswith("-") and not word[1:2].isdigit()}
        assert given - options_of(name) - {"--help", "--debug", "--install-completion", "-"} == set(), line


@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_files_of_the_repository_that_commands_name_are_there(snippet: Snippet) -> None:
    folders = tuple(f"{folder}/" for folder in ("configs", "data", "examples", "experts"))
    named = {word for line in snippet.commands for word in shlex.split(line, comments=True) if word.startswith(folders)}
    assert [word for word in named if "$" not in word and not (ROOT / Path(word)).exists()] == []
