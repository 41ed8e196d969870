"""Downloads, in processes of their own: whether the hub may be asked is read once, when its client is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ensemble_server.server.weights import download_progress
from tests.conftest import make_model
from tests.server.weights.hub import TOKEN, Hub

_RESOLVE = """
import logging, sys
from pathlib import Path
from ensemble_server.server.weights import download_progress
download_progress.logged_bar.__kwdefaults__["every_s"] = 0.0
from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights.checkpoints import resolve_checkpoint
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
logging.getLogger("httpx").setLevel(logging.WARNING)
try:
    print(resolve_checkpoint("org/tiny", relative_to=Path(), revision=sys.argv[1] or None))
except ModelLoadError as exc:
    print("refused:", exc)
"""


@dataclass(frozen=True)
class Resolved:
    answer: str
    log: str


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    revisions = {"main": make_model(root / "main"), "v1": make_model(root / "v1", num_hidden_layers=1)}
    with Hub("org/tiny", revisions).running() as running:
        yield running


@pytest.fixture
def resolve(hub: Hub, tmp_path: Path) -> Callable[..., Resolved]:
    """The folder of org/tiny, or why there is none, as a new process finds it with a cache of its own."""

    def run(revision: str = "", **variables: str) -> Resolved:
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [sys.executable, "-c", _RESOLVE, revision],
            env=os.environ | settings | variables,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return Resolved(done.stdout.strip(), done.stderr)

    return run


def layers(folder: str) -> int:
    return json.loads((Path(folder) / "config.json").read_bytes())["num_hidden_layers"]


@pytest.mark.slow
def test_a_revision_is_that_revision_and_the_default_is_the_main_branch(
    resolve: Callable[..., Resolved], hub: Hub
) -> None:
    assert layers(resolve("v1").answer) == 1
    assert layers(resolve().answer) == 2
    commit = hub.commit("v1")
    assert commit is not None and layers(resolve(commit).answer) == 1


@pytest.mark.slow
def test_the_token_comes_from_the_environment_and_a_gated_model_says_so(
    resolve: Callable[..., Resolved], hub: Hub
) -> None:
    refused = resolve(HF_TOKEN="wrong")
    assert refused.answer.startswith("refused: 'org/tiny'") and "HF_TOKEN" in refused.answer
    assert resolve().answer.startswith("/")
    assert {token for _, token in hub.asked} >= {"wrong", TOKEN}


@pytest.mark.slow
def test_a_revision_that_is_not_there_is_named(resolve: Callable[..., Resolved]) -> None:
    refused = resolve("v9")
    assert refused.answer.startswith("refused: 'org/tiny'") and "revision" in refused.answer


@pytest.mark.slow
def test_progress_is_lines_in_a_log_and_no_bar(resolve: Callable[..., Resolved]) -> None:
    log = resolve().log
    lines = [line for line in log.splitlines() if line.startswith("downloading org/tiny")]
    assert lines[0] == "downloading org/tiny from the Hugging Face hub"
    assert lines[-1].endswith("%") and len(lines) > 1
    assert "\r" not in log and "Fetching" not in log


@pytest.mark.slow
def test_what_is_in_the_cache_is_not_asked_for_again(resolve: Callable[..., Resolved], hub: Hub) -> None:
    first = resolve("v1")
    num_asked = len(hub.asked)
    assert resolve("v1", HF_HUB_OFFLINE="1") == Resolved(first.answer, "")
    assert len(hub.asked) == num_asked


def test_lines_come_no_oftener_than_asked() -> None:
    shares: list[float] = []
    bar = download_progress.logged_bar(shares.append, every_s=1e9)(unit="B", total=100, disable=True)
    bar.update(10)
    assert shares == []
    bar = download_progress.logged_bar(shares.append, every_s=0.0)(unit="B", total=100, disable=True)
    bar.update(10)
    bar.update(30)
    assert shares == [0.1, 0.4]
    files = download_progress.logged_bar(shares.append, every_s=0.0)(unit="it", total=4, disable=True)
    files.update(1)
    assert shares == [0.1, 0.4]
