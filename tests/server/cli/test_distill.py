from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ensemble_server.server.cli import distill as command
from ensemble_server.server.cli.app import app
from ensemble_server.server.distill.card import CARD_FILE
from tests.conftest import SAMPLE

pytestmark = pytest.mark.usefixtures("without_figures")

CONFIG = """\
models:
  llama: {{path: {llama}, dtype: float32}}
  red: {{base: llama, adapter: {red}}}
  mix: {{method: probability_average, members: [llama, red]}}
"""
SMALL = ("--window", "32", "--held-out", "0.2", "--top-k", "8")


@pytest.fixture
def config(tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENSEMBLE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(**tiny))
    (tmp_path / "text.txt").write_text(SAMPLE)
    return path


def arguments(config: Path, *more: str) -> list[str]:
    text, out = str(config.with_name("text.txt")), str(config.with_name("all"))
    return ["distill", str(config), "mix", "--student", "llama", "--text", text, "--out", out, *SMALL, *more]


def run(config: Path, *more: str):
    return CliRunner().invoke(app, arguments(config, *more))


def test_what_the_student_reached_is_printed_with_its_entry(config: Path) -> None:
    done = run(config, "--steps", "2", "--target", "min_ce", "--level", "token", "--init", "merge", "--seed", "3")
    assert done.exit_code == 0, done.output
    for said in ("llama after 2 steps", "before", "after", "the ensemble, mix", "{all: {base: llama, adapter: "):
        assert said in done.output
    card = json.loads((config.with_name("all") / CARD_FILE).read_text())
    assert card["settings"]["target"] == "min_ce"
    assert card["settings"]["seed"] == 3
    assert run(
        config, "--steps", "2", "--target", "min_ce", "--level", "token", "--init", "merge", "--seed", "3"
    ).stdout


def test_several_files_may_follow_one_option(config: Path) -> None:
    other = config.with_name("more.txt")
    other.write_text(SAMPLE[: len(SAMPLE) // 2])
    done = CliRunner().invoke(app, [*arguments(config, "--steps", "1"), "--text", str(config), str(other)])
    assert done.exit_code == 0, done.output
    assert len(json.loads((config.with_name("all") / CARD_FILE).read_text())["files"]) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--level", "token"], "belongs to the targets min_ce and avg_ce"),
        (["--full", "--rank", "4"], "belongs to an adapter"),
        (["--held-out", "0.7"], "--held-out Input should be less than 0.5"),
        (["--target", "best"], "'best' is not one of"),
        (["--align", "nearest"], "'nearest' is not one of"),
    ],
)
def test_options_that_cannot_be_are_called_wrongly(config: Path, more: list[str], message: str) -> None:
    done = run(config, *more)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_text_is_needed(config: Path) -> None:
    done = CliRunner().invoke(app, ["distill", str(config), "mix", "--student", "llama", "--out", "x"])
    assert done.exit_code == 2
    assert "at least one file" in done.output


def test_text_that_will_be_measured_on_is_refused(config: Path) -> None:
    done = run(config, "--test", str(config.with_name("text.txt")))
    assert done.exit_code == 1
    assert "Train on other text than will be measured" in str(done.exception)


def test_a_start_that_does_not_fit_is_refused_and_leaves_nothing(config: Path) -> None:
    for more, message in {
        ("--init", "mix"): "no weights of its own",
        ("--init", "merge", "--rank", "1"): "`rank` is 1; give at least",
    }.items():
        done = run(config, *more)
        assert done.exit_code == 1
        assert message in str(done.exception)
        assert not config.with_name("all").exists()


def test_ctrl_c_says_how_it_goes_on(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ensemble_server.server.distill.run.distill", interrupted)
    done = run(config)
    assert done.exit_code == command.INTERRUPTED
    assert "the same command goes on" in done.output


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_where_it_was(config: Path) -> None:
    """kill -9 once there is a checkpoint; the checkpoint is then what the next run begins with."""
    hurried = "import ensemble_server.server.distill.training as t; t.SECONDS_BETWEEN_CHECKPOINTS = 0.0; "
    program = hurried + "from ensemble_server.server.cli.app import main; main()"
    line = [sys.executable, "-c", program, *arguments(config, "--steps", "400")]
    checkpoint = config.parent / ".all.distilling" / "checkpoint.pt"
    with subprocess.Popen(line, env=os.environ, stderr=subprocess.PIPE) as process:
        while not checkpoint.exists():
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not config.with_name("all").exists()
    import torch

    reached = torch.load(checkpoint)["step"]
    assert 0 < reached < 400
    done = run(config, "--steps", "400")
    assert done.exit_code == 0, done.output
    assert len((config.with_name("all") / "losses.csv").read_text().splitlines()) == 401
