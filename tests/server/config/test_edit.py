"""Weights put into config files of all styles that YAML has, with everything else left as it was."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.config.edit import with_share, with_weights

WEIGHTS = {"base": 0.25, "co-de": 0.75}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("mix: {members: [base, co-de], pool: x}  # why", "mix: {members: {base: 0.25, co-de: 0.75}, pool: x}  # why"),
        ("mix: {members: {base: 1, co-de: 2e0}}", "mix: {members: {base: 0.25, co-de: 0.75}}"),
        ("mix: {members: [base,co-de,]}", "mix: {members: {base: 0.25,co-de: 0.75,}}"),
        ("mix: {members: [\"base\", 'co-de']}", "mix: {members: {\"base\": 0.25, 'co-de': 0.75}}"),
        (
            "mix:\n  members:\n    - base  # the old one\n    - co-de\n  pool: x",
            "mix:\n  members:\n    base: 0.25  # the old one\n    co-de: 0.75\n  pool: x",
        ),
        (
            "mix:\n  members:\n  - base\n  # between\n  -   co-de\n  pool: x",
            "mix:\n  members:\n    base: 0.25\n  # between\n    co-de: 0.75\n  pool: x",
        ),
        (
            "mix:\n  pool: x\n  members:\n    base: 1    # one\n    co-de: 3",
            "mix:\n  pool: x\n  members:\n    base: 0.25    # one\n    co-de: 0.75",
        ),
        (
            "mix:\n  members: [\n    base, # one\n    co-de,\n  ]",
            "mix:\n  members: {\n    base: 0.25, # one\n    co-de: 0.75,\n  }",
        ),
    ],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_only_the_members_of_the_entry_change(before, after, line_end):
    template = (
        "# top\nmodels:\n  base: {path: a} # é😀\n\n  other: {members: [base, co-de]}\n  ENTRY\nserver: {port: 1}\n"
    )
    source, expected = (
        template.replace("ENTRY", entry.replace("\n", "\n  ")).replace("\n", line_end) for entry in (before, after)
    )
    assert with_weights(source, "mix", WEIGHTS) == expected
    assert yaml.safe_load(expected)["models"]["mix"]["members"] == WEIGHTS


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=3), st.booleans(), st.booleans(), st.booleans())
def test_what_is_written_is_read_again(values, is_flow, is_map, is_flow_entry):
    names = ["a", "b", "true"]
    members = dict.fromkeys(names, 1) if is_map else names
    entry = {"method": "probability_average", "members": members, "listed": False}
    text = yaml.safe_dump({"models": {"mix": entry}}, default_flow_style=None if is_flow else is_flow_entry)
    weights = dict(zip(names, values, strict=True))
    found = yaml.safe_load(with_weights(text, "mix", weights))["models"]["mix"]
    assert found["members"] == pytest.approx(weights, abs=5.1e-5)
    assert found["listed"] is False


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("{pool: posterior, share: 0.01}", "{pool: posterior, share: 0.05}"),
        ("{members: [a], pool: posterior}", "{members: [a], share: 0.05, pool: posterior}"),
        (
            "\n    members: [a]\n    pool: posterior  # why\n    listed: false",
            "\n    members: [a]\n    share: 0.05\n    pool: posterior  # why\n    listed: false",
        ),
    ],
)
def test_a_share_is_changed_or_put_before_the_pool(before, after):
    assert with_share(f"models:\n  mix: {before}\n", "mix", 0.05) == f"models:\n  mix: {after}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: {a: &x {members: [base, co-de]}, mix: *x}", "alias"),
        ("models: {a: {members: &x [base, co-de]}, mix: {members: *x}}", "alias"),
        ("models: {a: &x {members: [base, co-de]}, mix: {<<: *x, pool: y}}", "'members' is not written there"),
        ("models: {other: {members: [base, co-de]}}", "'mix' is not written there"),
        ("models: {mix: {members: [base]}}", "has base; the weights are of base, co-de"),
    ],
)
def test_what_cannot_be_changed_alone_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        with_weights(text, "mix", WEIGHTS)


def test_a_share_needs_a_pool_to_stand_before():
    with pytest.raises(ConfigError, match="no key `pool`"):
        with_share("models: {mix: {members: [a]}}", "mix", 0.1)
