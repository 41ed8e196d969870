"""What a request may say about its mixture. Needs no vLLM."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.base import Mixture
from ensemble_server.server.one_model.vllm.request_mixture import Directory, RequestMixture

MEMBERS = ("base", "code", "prose")
PLAIN = Directory(MEMBERS, Mixture({"base": 1.0, "code": 3.0}))
POSTERIOR = Directory(MEMBERS, Mixture({"base": 1.0, "code": 1.0, "prose": 2.0}, "posterior", 0.1))


def test_a_request_that_says_nothing_gets_the_directorys_mixture():
    assert PLAIN.of_request(None) == RequestMixture((0.25, 0.75, 0.0), "arithmetic", 0.0)
    assert POSTERIOR.of_request({}) == RequestMixture((0.25, 0.25, 0.5), "posterior", 0.1)


def test_keys_of_others_are_left_alone():
    assert PLAIN.of_request({"kv_transfer_params": {}, "top_h": 1}) == PLAIN.default


def test_weights_are_in_the_directorys_order_and_scaled():
    assert PLAIN.of_request({"ensemble_weights": [0, 1, 1]}).weights == (0.0, 0.5, 0.5)
    geometric = PLAIN.of_request({"ensemble_weights": [2, -1, 0.5], "ensemble_pool": "geometric"})
    assert geometric == RequestMixture((2.0, -1.0, 0.5), "geometric", 0.0)


@pytest.mark.parametrize("pool", ["arithmetic", "posterior"])
def test_a_member_alone_needs_no_evidence(pool):
    """Also on a directory that keeps none."""
    wanted = {"ensemble_weights": [0, 5, 0], "ensemble_pool": pool}
    assert (
        PLAIN.of_request(wanted) == POSTERIOR.of_request(wanted) == RequestMixture((0.0, 1.0, 0.0), "arithmetic", 0.0)
    )


def test_another_pool_drops_the_directorys_share():
    assert POSTERIOR.of_request({"ensemble_pool": "geometric"}).share == 0.0


def test_without_a_share_evidence_serves_any_prior():
    wanted = {"ensemble_weights": [1, 1, 0], "ensemble_share": 0}
    assert POSTERIOR.of_request(wanted) == RequestMixture((0.5, 0.5, 0.0), "posterior", 0.0)


@pytest.mark.parametrize(
    ("directory", "extra", "message"),
    [
        (PLAIN, {"ensemble_wieghts": [1, 1, 1]}, "unknown key 'ensemble_wieghts'; did you mean 'ensemble_weights'"),
        (PLAIN, {"ensemble_weights": [1, 1]}, "must have 3 numbers, one per member .base, code, prose., got 2"),
        (PLAIN, {"ensemble_weights": "1,1,1"}, "must be a list of numbers"),
        (PLAIN, {"ensemble_weights": {"base": 1}}, "must be a list of numbers"),
        (PLAIN, {"ensemble_weights": [1, True, 1]}, "must be a list of numbers"),
        (PLAIN, {"ensemble_weights": [1, math.nan, 1]}, "'code' has nan"),
        (PLAIN, {"ensemble_weights": [1, math.inf, 1]}, "'code' has inf"),
        (PLAIN, {"ensemble_weights": [1, -1, 1]}, "takes no negative weight"),
        (PLAIN, {"ensemble_weights": [0, 0, 0]}, "at least one weight must be positive"),
        (PLAIN, {"ensemble_pool": ["arithmetic"]}, "ensemble_pool must be one of"),
        (PLAIN, {"ensemble_pool": "posterior"}, "export it with `pool: posterior`"),
        (PLAIN, {"ensemble_share": 0.5}, "share belongs to the posterior pool"),
        (POSTERIOR, {"ensemble_share": 1}, "from 0 to below 1, got 1"),
        (POSTERIOR, {"ensemble_share": 0.2}, "ensemble_share: with a share above 0"),
        (POSTERIOR, {"ensemble_weights": [1, 1, 1]}, "ensemble_weights: with a share above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(directory, extra, message):
    with pytest.raises(ValueError, match=message):
        directory.of_request(extra)


@given(
    st.dictionaries(
        st.sampled_from(["ensemble_weights", "ensemble_pool", "ensemble_share", "ensemble", "other"]),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5) | st.just("geometric"),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
            max_leaves=6,
        ),
    )
)
def test_whatever_is_sent_gives_a_usable_mixture_or_a_value_error(extra):
    for directory in (PLAIN, POSTERIOR):
        try:
            mixture = directory.of_request(extra)
        except ValueError:
            continue
        assert len(mixture.weights) == len(MEMBERS)
        assert all(map(math.isfinite, mixture.weights))
        assert max(mixture.weights) > 0
