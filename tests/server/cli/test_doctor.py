from __future__ import annotations

from collections.abc import Callable

import pytest

from ensemble_server.server.cli.doctor import DISTRIBUTION
from tests.server.cli.conftest import Run


@pytest.fixture
def required(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the project says it requires, as package metadata writes it."""
    lines = ["rich>=13"]
    monkeypatch.setattr(
        "ensemble_server.server.cli.doctor.requires", lambda name: lines if name == DISTRIBUTION else None
    )
    return lines


def line(run: Run, topic: str) -> str:
    return next(line for line in run.out.splitlines() if line.startswith(topic + " "))


def test_a_machine_that_has_everything_passes(ensemble: Callable[..., Run]) -> None:
    run = ensemble("doctor")
    assert run.code == 0, run.out
    for topic in (
        "python",
        "memory",
        "cache",
        "ensemble-server",
        "torch",
        "transformers",
        "fastapi",
        "threads",
        "extra test",
    ):
        assert " ok " in line(run, topic)


@pytest.mark.parametrize(
    ("requirement", "text"), [("no-such-thing>=3", "not installed (needs >=3)"), ("rich>=999", "999")]
)
def test_a_needed_package_that_is_missing_or_too_old_fails(
    ensemble: Callable[..., Run], required: list[str], requirement: str, text: str
) -> None:
    required[:] = [requirement]
    run = ensemble("doctor")
    assert run.code == 1
    shown = line(run, requirement.partition(">")[0])
    assert " missing " in shown
    assert text in shown
    assert "\n  pip install -c constraints.txt -e .\n" in run.out


def test_a_missing_extra_comes_with_its_command_and_does_not_fail(
    ensemble: Callable[..., Run], required: list[str]
) -> None:
    required += ['no-such-thing; extra == "test"', 'rich; extra == "demo"']
    run = ensemble("doctor")
    assert run.code == 0
    assert "not installed: no-such-thing" in line(run, "extra test")
    assert " ok " in line(run, "extra demo")
    assert "\n  pip install -c constraints.txt -e '.[test]'\n" in run.out


def test_a_cache_that_cannot_be_written_fails(
    ensemble: Callable[..., Run], required: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    run = ensemble("doctor")
    assert run.code == 1
    assert "it cannot be written" in line(run, "cache")
