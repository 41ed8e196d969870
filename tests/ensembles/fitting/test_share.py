import numpy as np
import pytest

from ensemble_server.ensembles.fitting.share import fit_share, posterior_logprobs

GOOD, BAD = np.log(0.5), np.log(0.01)


def text_of(*runs: tuple[int, int]) -> np.ndarray:
    """(which of two members is right, for how many tokens), ..."""
    return np.hstack(
        [np.full((2, length), BAD) + (np.arange(2) == right)[:, None] * (GOOD - BAD) for right, length in runs]
    )


def test_plain_bayes_is_the_arithmetic_mean_of_whole_texts():
    # By hand: the product of the mixture's steps telescopes to 1/2 p_1(text) + 1/2 p_2(text).
    text = text_of((0, 2), (1, 1))
    whole = np.log(0.5 * np.exp(text[0].sum()) + 0.5 * np.exp(text[1].sum()))
    assert posterior_logprobs(text, np.full(2, 0.5), 0.0).sum() == pytest.approx(whole)


def test_a_text_of_one_kind_wants_no_share():
    assert fit_share([text_of((0, 200))], np.full(2, 0.5)).share == 0


def test_a_text_that_switches_wants_a_share_near_its_rate_of_switching():
    fit = fit_share([text_of(*((n % 2, 20) for n in range(20)))], np.full(2, 0.5))
    assert 0.03 <= fit.share <= 0.2  # half of what is shared flows back to where it came from: 2/20
    assert min(fit.nats_per_token) < fit.nats_per_token[0]


def test_only_counted_tokens_are_judged_but_all_are_followed():
    text = text_of((0, 50), (1, 50))
    late = np.arange(100) >= 60
    fit = fit_share([text], np.full(2, 0.5), counted=[late], grid=(0.0, 0.1))
    expected = [-posterior_logprobs(text, np.full(2, 0.5), share)[late].mean() for share in (0.0, 0.1)]
    assert fit.nats_per_token == pytest.approx(expected)


def test_each_text_starts_from_the_prior():
    one = text_of((0, 30))
    twice = fit_share([one, one], np.full(2, 0.5), grid=(0.01,))
    assert twice.nats_per_token == fit_share([one], np.full(2, 0.5), grid=(0.01,)).nats_per_token


def test_nothing_to_judge_is_refused():
    with pytest.raises(ValueError, match="no token"):
        fit_share([], np.full(2, 0.5))
