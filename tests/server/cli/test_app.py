from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ensemble_server.server.cli.app import COMMANDS
from tests.server.cli.conftest import Run

HEAVY = (
    "torch",
    "transformers",
    "peft",
    "sentence_transformers",
    "huggingface_hub",
    "fastapi",
    "numpy",
    "httpx",
    "mergekit",
    "pandas",
    "matplotlib",
    "ray",
)


# One process asks for all, since a process takes longer to start than help to be written.
EVERY_HELP = """
import contextlib, io, json, sys
from ensemble_server.server.cli.app import main
names, heavy = json.loads(sys.argv[1])
told, loaded = {}, set()
for name in names:
    sys.argv, out = ["ensemble", *name.split(), "--help"], io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main()
    new = {module for module in heavy if module in sys.modules} - loaded
    loaded |= new
    told[name] = (out.getvalue(), sorted(new))
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[str, list[str]]]:
    """Of each command, and of "" for none: its help, and what is heavy and was not imported before it."""
    arguments = json.dumps([["", *COMMANDS], HEAVY])
    run = subprocess.run([sys.executable, "-c", EVERY_HELP, arguments], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy(helps: dict[str, tuple[str, list[str]]], command: str) -> None:
    text, imported = helps[command]
    assert f"Usage: {' '.join(['ensemble', *command.split()])}" in text
    assert imported == []


def test_help_lists_every_command_with_its_sentence(ensemble: Callable[..., Run]) -> None:
    run = ensemble("--help")
    assert run.code == 0
    for command in COMMANDS:
        assert f"│ {command} " in run.out


@pytest.mark.parametrize("command", [[], *(name.split() for name in COMMANDS)], ids=" ".join)
def test_help_of_flags_names_no_kind_of_value(ensemble: Callable[..., Run], command: list[str]) -> None:
    assert "bool" not in ensemble(*command, "--help").out.lower()


def test_libraries_draw_no_bars_into_log_files() -> None:
    code = (
        "import atexit, sys; from ensemble_server.server.cli.app import main\n"
        "def draw():\n    from tqdm.auto import tqdm\n    print(list(tqdm(range(3))))\n"
        "atexit.register(draw); sys.argv = ['ensemble', '--version']; main()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.endswith("[0, 1, 2]\n")
    assert run.stderr == ""


def test_the_module_runs_as_the_script_does() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "ensemble_server", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("ensemble-server ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Usage: ensemble"),
        (["serv"], "Did you mean 'serve'?"),
        (["serve"], "give a CONFIG, or --demo, or models"),
        (["fit"], "Missing argument 'CONFIG'"),
        (["serve", "no.yaml"], "'no.yaml' does not exist"),
        (["serve", __file__, "--port", "70000"], "Invalid value for '--port'"),
        (["models", "--no-such-option"], "No such option"),
    ],
)
def test_a_wrong_call_exits_with_2(ensemble: Callable[..., Run], arguments: list[str], said: str) -> None:
    run = ensemble(*arguments)
    assert run.code == 2
    assert said in run.out + run.err


@pytest.mark.parametrize("command", ["serve", "models", "chat"])
def test_a_wrong_config_is_one_error_and_exits_with_1(
    ensemble: Callable[..., Run], command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    file = tmp_path / "c.yaml"
    file.write_text("models: {a: {pth: x}}", encoding="utf-8")
    run = ensemble(command, file)
    assert run.code == 1
    assert run.err.startswith(f"error: {file}: models.a: must have one of `path` or `base`")
    assert run.err.count("\n") == 1


@pytest.mark.parametrize("place", [0, *(pytest.param(place, marks=pytest.mark.slow) for place in (1, 2))])
def test_debug_shows_the_traceback_wherever_it_stands(place: int, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("models: {}", encoding="utf-8")
    arguments = ["models", str(file)]
    arguments.insert(place, "--debug")
    run = subprocess.run(
        [sys.executable, "-m", "ensemble_server", *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "Traceback (most recent call last)" in run.stderr
    assert "ConfigError" in run.stderr


def test_an_unforeseen_error_is_one_line_that_tells_how_to_see_more(
    ensemble: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise KeyError("oops")

    monkeypatch.setattr("ensemble_server.server.cli.doctor.doctor", fails)
    run = ensemble("doctor")
    assert run.code == 1
    assert run.err == "error: KeyError: 'oops' (run again with --debug for the traceback)\n"


def test_a_command_of_two_words_goes_before_that_of_its_first_word(
    ensemble: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMMANDS, "models of", "ensemble_server.server.cli.doctor:doctor")
    for words, said in ((["models", "of"], "Usage: ensemble models of [OPTIONS]\n"), (["models"], "CONFIG")):
        run = ensemble(*words, "--help")
        assert run.code == 0
        assert said in "\n".join(line.rstrip() for line in run.out.splitlines()) + "\n"


def test_version_names_what_answers_depend_on(ensemble: Callable[..., Run]) -> None:
    run = ensemble("version")
    assert run.code == 0
    assert run.out.splitlines()[0].startswith("ensemble-server ")
    assert "\ntorch " in run.out


def test_commands_and_options_are_completed_by_the_shell(
    ensemble: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_ENSEMBLE_COMPLETE", "complete_bash")
    for line, place, found in (("ensemble ve", 1, "version"), ("ensemble batch --max-e", 2, "--max-errors")):
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(place))
        assert found in ensemble().out.split()


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_names_no_type_for_flags(ensemble: Callable[..., Run], command: str) -> None:
    assert "<bool>" not in ensemble(*command.split(), "--help").out
