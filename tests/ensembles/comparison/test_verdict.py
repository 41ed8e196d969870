import pytest

from ensemble_server.ensembles.comparison.intervals import Interval
from ensemble_server.ensembles.comparison.verdict import verdict


@pytest.mark.parametrize(
    ("low", "high", "higher_is_better", "expected"),
    [
        (0.01, 0.05, True, "better"),
        (0.01, 0.05, False, "worse"),
        (-0.05, -0.01, True, "worse"),
        (-0.05, -0.01, False, "better"),
        (-0.01, 0.015, True, "no difference shown"),
        (-0.01, 0.03, True, "inconclusive"),
        (-0.03, 0.01, False, "inconclusive"),
        (0.0, 0.05, True, "inconclusive"),
        (0.0, 0.0, True, "no difference shown"),
        (0.001, 0.002, True, "better by less than the margin"),
        (0.001, 0.02, False, "worse by less than the margin"),
        (0.001, 0.021, True, "better"),
    ],
)
def test_the_verdict_follows_from_interval_and_margin(low, high, higher_is_better, expected):
    assert verdict(Interval(low, high), margin=0.02, higher_is_better=higher_is_better) == expected


def test_a_corrected_p_value_can_take_a_win_back():
    interval = Interval(0.01, 0.05)
    assert verdict(interval, margin=0.02, higher_is_better=True, adjusted_p_value=0.04) == "better"
    assert verdict(interval, margin=0.02, higher_is_better=True, adjusted_p_value=0.06) == "inconclusive"
    assert verdict(Interval(0.001, 0.01), margin=0.02, higher_is_better=True, adjusted_p_value=0.06) == (
        "no difference shown"
    )


def test_too_few_items_for_an_interval_are_too_few():
    assert verdict(None, margin=0.02, higher_is_better=True) == "too few items"


def test_items_that_cannot_give_a_small_p_value_are_too_few_unless_they_show_that_nothing_matters():
    reach = {"margin": 0.02, "higher_is_better": True, "adjusted_p_value": 1.0, "smallest_p_value": 0.3}
    assert verdict(Interval(0.01, 0.5), **reach) == "too few items"
    assert verdict(Interval(-0.01, 0.01), **reach) == "no difference shown"


def test_two_that_answered_nothing_are_not_called_equal():
    assert verdict(Interval(0, 0), margin=0.02, higher_is_better=True, is_answered=False) == "nothing was answered"


def test_a_negative_margin_is_refused():
    with pytest.raises(ValueError, match="margin"):
        verdict(Interval(0, 1), margin=-1, higher_is_better=True)
