"""Smoothing, crossings and the bootstrap against brute force, scipy and known coverage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from env.measure.stats import (
    antitonic,
    bootstrap_attainment,
    bootstrap_weights,
    crossing,
    interval,
    iqm,
    stratified_iqm,
)

values = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@given(values, st.integers(0, 10_000))
def test_antitonic_is_scipys_weighted_isotonic_fit(y, seed):
    weights = np.random.default_rng(seed).uniform(0.1, 5, len(y))
    expected = isotonic_regression(y, weights=weights, increasing=False).x
    np.testing.assert_allclose(antitonic(y, weights), expected, atol=1e-9)


@given(st.lists(values, min_size=1, max_size=1).map(lambda rows: rows * 3))
def test_antitonic_works_row_by_row(rows):
    np.testing.assert_allclose(antitonic(rows)[1], antitonic(rows[1]), atol=1e-12)


def test_crossing_interpolates_and_reports_both_ends():
    rates = [1.0, 2.0, 4.0]
    assert crossing(rates, [1.0, 0.95, 0.85], 0.9) == pytest.approx(3.0)
    assert crossing(rates, [0.8, 0.7, 0.6], 0.9) == 0.0
    assert crossing(rates, [1.0, 1.0, 0.9], 0.9) == 4.0
    np.testing.assert_allclose(crossing(rates, [[1.0, 0.95, 0.85], [0.8, 0.7, 0.6]], 0.9), [3.0, 0.0])


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    """Bernoulli requests with attainment 0.9: about 95 of 100 intervals must hold it."""
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        good = rng.binomial(100, 0.9, size=(1, 5, 20))
        weights = bootstrap_weights(5, 20, 400, seed=trial)
        low, high = interval(bootstrap_attainment(good, np.full((1, 5, 20), 100), weights)[:, 0])
        covered += low <= 0.9 <= high
    assert 180 <= covered <= 200


def test_seed_noise_widens_the_interval_that_block_noise_alone_would_give():
    rng = np.random.default_rng(2)
    level = rng.normal(0.85, 0.05, size=6)
    good = np.broadcast_to((100 * level).round()[None, :, None], (1, 6, 20))
    low, high = interval(bootstrap_attainment(good, np.full((1, 6, 20), 100), bootstrap_weights(6, 20, 1000, 0))[:, 0])
    assert high - low > 0.04
    assert low < level.mean() < high


def test_every_resample_draws_as_many_blocks_as_there_are():
    weights = bootstrap_weights(3, 8, 50, seed=0)
    assert (weights.sum(axis=(1, 2)) == 24).all()
    assert (weights.sum(axis=2) % 8 == 0).all()


def test_iqm_drops_a_quarter_at_either_end():
    assert iqm([0.0, 1.0, 2.0, 100.0]) == 1.5
    assert iqm([3.0]) == 3.0
    value, low, high = stratified_iqm([[0.9, 0.91, 0.92, 0.1], [0.5, 0.52, 0.54, 0.56]])
    assert low <= value <= high
