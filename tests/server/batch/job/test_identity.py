"""Seeds, digests and ids that are the same at every run, and what tells one job from another."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.server.batch.job.identity import (
    Identity,
    body_digest,
    encoded_body,
    ids_from,
    model_fingerprints,
    needed_part,
    seeded,
    shared_digest,
)
from ensemble_server.server.batch.job.rows import Row
from ensemble_server.server.config.fingerprints import fingerprint
from ensemble_server.server.config.loading import parse_config

TEXT = "/v1/completions"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
BODIES = st.dictionaries(st.text(), JSON, max_size=5)


def row(custom_id: str = "a", url: Any = TEXT, **body: Any) -> Row:
    return Row(0, custom_id, url, {"prompt": "x"} | body)


# --- what has changed ---


def test_nothing_has_changed_between_equals() -> None:
    assert Identity({"a": "1"}, seed=2).changes_to(Identity({"a": "1"}, seed=2)) == []


def test_every_change_is_named() -> None:
    changes = Identity({"a": "1", "b": "2"}).changes_to(Identity({"b": "3", "c": "4"}, seed=5))
    assert changes == [
        "a was '1', is now not given",
        "b was '2', is now '3'",
        "the job's seed was '0', is now '5'",
        "c was not given, is now '4'",
    ]


def test_a_long_value_is_cut() -> None:
    [change] = Identity({"a": "x" * 1000}).changes_to(Identity({"a": "y"}))
    assert len(change) < 150


def test_fingerprints_are_of_the_models_that_rows_name() -> None:
    models = {"base": {"path": "/nowhere"}, "mix": {"method": "probability_average", "members": ["base"]}}
    config = parse_config({"models": models}, source=Path("/config.yaml"))
    assert model_fingerprints(["mix", "unknown", None], config) == {"mix": fingerprint("mix", config)}
    alone = parse_config({"models": {"base": models["base"]}}, source=Path("/config.yaml"))
    assert list(model_fingerprints([None], alone)) == ["base"]


def test_of_a_config_only_what_the_rows_name_is_needed() -> None:
    models = {
        "base": {"path": "org/base"},
        "red": {"base": "base", "adapter": "red"},
        "other": {"path": "org/other"},
        "mix": {"method": "probability_average", "members": ["base", "red"]},
    }
    config = parse_config({"models": models}, source=Path("/config.yaml"))
    assert list(needed_part(config, ["mix"]).models) == ["base", "red", "mix"]
    assert list(needed_part(config, ["other"]).models) == ["other"]
    assert needed_part(config, ["other", None]) is config, "the row without a model is told which there are"
    assert needed_part(config, ["other", "odher"]) is config


# --- seeds ---


def test_a_seed_of_its_own_is_kept() -> None:
    assert seeded(row(seed=0), 5) == row(seed=0)


def test_a_seed_follows_from_the_job_and_the_custom_id() -> None:
    def seed(job_seed: int, **changes: Any) -> int:
        return seeded(row(**changes), job_seed).body["seed"]

    assert seed(1) == seed(1) == seed(1, prompt="another")
    assert seed(1) != seed(2)
    assert seed(1) != seed(1, custom_id="b")
    assert seed(1, seed=None) == seed(1)


def test_equal_greedy_rows_get_equal_seeds() -> None:
    one, same, other = row("a", temperature=0), row("b", temperature=0.0), row("c", temperature=0, prompt="y")
    assert seeded(one, 1).body["seed"] == seeded(row("z", temperature=0), 1).body["seed"]
    assert seeded(one, 1).body["seed"] != seeded(other, 1).body["seed"]
    assert 0 <= seeded(same, 1).body["seed"] < 2**31


@pytest.mark.parametrize("url", ["/v1/embeddings", "/v1/classify"])
def test_what_draws_nothing_needs_no_seed(url: Any) -> None:
    assert seeded(row(url=url), 1) == row(url=url)
    assert shared_digest(row(url=url)) is not None


# --- digests and ids ---


def test_only_rows_that_repeat_share_an_answer() -> None:
    assert shared_digest(row()) is None
    assert shared_digest(row(temperature=1)) is None
    assert shared_digest(row(temperature=False)) is None
    assert shared_digest(row(temperature=0)) == shared_digest(row("b", temperature=0)) != shared_digest(row(seed=1))


@given(BODIES, BODIES)
def test_digests_are_equal_exactly_where_bodies_are(one: dict[str, Any], other: dict[str, Any]) -> None:
    same = encoded_body(one) == encoded_body(other) if _is_text(one) and _is_text(other) else None
    if same is not None:
        assert (body_digest(Row(0, "a", TEXT, one)) == body_digest(Row(1, "b", TEXT, other))) is same


def _is_text(body: dict[str, Any]) -> bool:
    try:
        repr(body).encode()
        encoded_body(body)
    except ValueError:
        return False
    return True


def test_the_same_body_at_another_address_is_another_request() -> None:
    assert body_digest(row(url="/v1/embeddings")) != body_digest(row(url="/v1/classify"))


@pytest.mark.parametrize("value", [math.nan, math.inf, "\ud800", {1, 2}, object()])
def test_what_json_cannot_say_is_a_value_error(value: Any) -> None:
    with pytest.raises(ValueError):
        encoded_body({"x": value})


def test_a_body_that_contains_itself_is_a_value_error() -> None:
    body: dict[str, Any] = {}
    body["self"] = body
    with pytest.raises(ValueError):
        encoded_body(body)


def test_ids_begin_with_the_digest_and_never_repeat() -> None:
    digest = body_digest(row())
    first, again = ids_from(digest), ids_from(digest)
    ids = [first() for _ in range(50)]
    assert ids[0] == digest.hex()
    assert ids == [again() for _ in range(50)]
    assert len(set(ids)) == 50 and all(len(one) == 32 for one in ids)
