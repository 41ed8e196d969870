"""What a fingerprint tells apart. How models depend on each other is seen in test_hosting.py."""

from __future__ import annotations

from pathlib import Path

from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.fingerprints import fingerprint
from ensemble_server.server.config.loading import parse_config


def config_of(**engine: object) -> Config:
    return parse_config({"models": {"a": {"path": "org/a"}}, "engine": engine}, source=Path("/config.yaml"))


def test_answers_of_another_engine_are_told_apart() -> None:
    assert fingerprint("a", config_of(kind="vllm")) != fingerprint("a", config_of())


def test_how_much_an_engine_does_at_once_changes_no_answer() -> None:
    assert fingerprint("a", config_of(kind="vllm", max_batch=1)) == fingerprint("a", config_of(kind="vllm"))
    assert fingerprint("a", config_of(max_batch=1)) == fingerprint("a", config_of())


def test_weights_that_are_rounded_give_other_answers() -> None:
    assert fingerprint("a", config_of(weights="half")) != fingerprint("a", config_of())
    assert fingerprint("a", config_of(weights="full")) == fingerprint("a", config_of())


def test_a_default_that_is_written_out_changes_nothing() -> None:
    """And so a key that a later version adds does not make another job of one that has begun."""

    def of(**settings: object) -> str:
        models = {"a": {"path": "org/a"}, "b": {"path": "org/b"}}
        mix = {"method": "probability_average", "members": ["a", "b"], **settings}
        return fingerprint("mix", parse_config({"models": {**models, "mix": mix}}, source=Path("/config.yaml")))

    assert of(pool="arithmetic", listed=True) == of()
    assert len({of(), of(pool="geometric"), of(method="majority"), of(members={"a": 1, "b": 2})}) == 4
