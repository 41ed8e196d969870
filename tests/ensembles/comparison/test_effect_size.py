import math

import numpy as np
import pytest

from ensemble_server.ensembles.comparison.effect_size import cohens_d_z, cohens_h, discordant_odds
from ensemble_server.ensembles.comparison.power import OfMean


def test_cohens_h_by_hand():
    assert cohens_h(0.5, 0.25) == pytest.approx(math.pi / 2 - math.pi / 3)
    assert cohens_h(0.25, 0.5) == -cohens_h(0.5, 0.25)
    assert cohens_h(1, 0) == pytest.approx(math.pi)


def test_cohens_d_z_is_the_mean_over_the_spread_of_differences():
    assert cohens_d_z(np.array([1.0, 2.0, 3.0])) == pytest.approx(2.0)
    assert cohens_d_z(np.zeros(4)) == 0
    assert cohens_d_z(np.full(4, -0.1)) == -math.inf
    assert cohens_d_z(np.array([1.0])) == math.inf


def test_odds_of_divided_items_are_finite():
    assert discordant_odds(7, 2) == 3.0
    assert discordant_odds(0, 0) == 1.0
    assert discordant_odds(3, 0) == 7.0


def test_the_detectable_effect_is_found_as_often_as_it_says():
    """2000 simulated comparisons of 100 items whose true difference is the detectable one: 80% are significant."""
    rng = np.random.default_rng(0)
    effect = OfMean(1 / math.sqrt(100), 1e9).detectable(alpha=0.05)
    assert effect == pytest.approx(2.8016 / 10, abs=1e-4)
    found = np.abs(rng.normal(effect, 0.1, size=2000)) > 1.96 * 0.1
    assert found.mean() == pytest.approx(0.8, abs=0.03)
