"""What no mark excuses is run: page by page, in order, on tiny models in the place of the configs' own.

`ensemble` runs in this process, all else in bash. A server is one with the models of all configs that pages serve, and
requests go to its port. What a command prints is not compared: these models say nothing sensible.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ensemble_server.server.cli.app import main
from tests.clients.conftest import LiveServer, server_of
from tests.docs.snippets import PAGES, ROOT, Snippet, snippets

pytestmark = pytest.mark.slow
RUN_PAGES = [page for page in PAGES if any(s.kind in ("python", "shell") and s.mark is None for s in snippets(page))]
SERVED = ("demo", "crowd-vote", "majority", "ranking")
ADDRESS = re.compile(r"(http://)?127\.0\.0\.1:8000")
QUICKER = {"--max-tokens 128": "--max-tokens 4", "-n 24": "-n 3", "--samples 8": "--samples 2"}
FILES = {
    "questions.csv": "id,country\nq1,France\nq2,Japan\nq3,Brazil\nq4,Kenya\n",
    "sample_submission.csv": "id,capital\nq1,\nq2,\nq3,\nq4,\n",
    "prompt.jinja": "{{ question }}\n",
    "lines.jsonl": '{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "To be", "max_tokens": 4}}\n'
    '{"custom_id": "b", "url": "/v1/completions", "body": {"prompt": "or\n'
    '{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "not", "max_tokens": 4}}\n',
}


def tiny_config(name: str, tiny: dict[str, Path]) -> dict[str, Any]:
    """The config of that name, with tiny models for its own."""
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    adapters = iter(("red", "green", "blue"))
    for model in config["models"].values():
        if "path" in model:
            model["path"] = str(tiny["llama"])
        if "adapter" in model:
            model["adapter"] = str(tiny[next(adapters)])
    config["engine"] = {"kind": "transformers", "max_context": 2048}
    return config


@pytest.fixture
def folder(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """Where a page is followed: what it needs of the repository, and files that readers have."""
    for name in ("data", "examples", "experts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "base").symlink_to(tiny["llama"])
    (tmp_path / "tuned").symlink_to(tiny["deep"])
    (tmp_path / "configs").mkdir()
    for name in SERVED:
        (tmp_path / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(tiny_config(name, tiny)))
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture(scope="module")
def server(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    configs = [tiny_config(name, tiny) for name in SERVED]
    models = {name: model for config in configs[::-1] for name, model in config["models"].items()}
    file = tmp_path_factory.mktemp("served") / "all.yaml"
    file.write_text(yaml.safe_dump({**configs[0], "models": models, "server": {"port": 0}}))
    with server_of(file) as server:
        yield server


@pytest.fixture
def ensemble(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """Run a command line of ours in this process. -> its exit code"""

    def run(words: list[str]) -> int:
        monkeypatch.setattr("sys.argv", words)
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))  # for `ensemble chat`
        monkeypatch.setenv("TQDM_DISABLE", "")
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0)

    return run


@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_and_programs_of_a_page_run(
    page: Path, folder: Path, server: LiveServer, ensemble: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    to_run = [s for s in snippets(page) if s.mark is None and s.kind in ("python", "shell")]
    if shutil.which("curl") is None and any(line.startswith("curl ") for s in to_run for line in s.commands):
        pytest.skip("needs curl")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for snippet in to_run:
        if snippet.kind == "python":
            exec(compile(ADDRESS.sub(server.url, snippet.text), str(snippet), "exec"), {"__name__": "__main__"})
            continue
        for command, expected in expectations(snippet):
            if command.startswith("ensemble serve "):
                continue  # the server of all pages
            line = ADDRESS.sub(server.url, command.replace("\\\n", " "))
            for slow, quick in QUICKER.items():
                line = line.replace(slow, quick)
            if line.startswith("ensemble ") and not re.search(r"[|>]\s", line):
                code = ensemble(shlex.split(line, comments=True))
            else:
                code = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", with_failing_curl(line)], check=False
                ).returncode
            assert code == expected, f"{snippet}: {line}"


def expectations(snippet: Snippet) -> Iterator[tuple[str, int]]:
    """Each command, and the exit code that the page shows of it: 0, or what `echo $?` prints."""
    commands = snippet.commands
    shown = re.search(r"^\$ echo \$\?\n(\d+)", snippet.text, re.MULTILINE)
    for command, following in zip(commands, [*commands[1:], ""], strict=True):
        if command != "echo $?":
            yield command, int(shown[1]) if shown and following == "echo $?" else 0


def with_failing_curl(line: str) -> str:
    """curl that fails where the server refuses."""
    return re.sub(r"^curl ", "curl --fail-with-body --silent ", line)
