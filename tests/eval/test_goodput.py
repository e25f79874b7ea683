"""The search on curves whose goodput is known."""

import numpy as np
import pytest
from eval_cases import true_attainment, true_goodput

from env.measure.goodput import find_goodput, goodput_of_curve


@pytest.mark.parametrize("start", [0.01, 1.0, 37.0, 5_000.0])
def test_finds_the_known_goodput_from_any_start(start):
    found = find_goodput(lambda rate: true_attainment(rate, 40.0), start)
    for target in (0.9, 0.95, 0.99):
        result = found.at(target)
        exact = true_goodput(40.0, target)
        assert result.rate == pytest.approx(exact, rel=0.01)
        assert result.low <= exact <= result.high <= result.low * 1.01 + 1e-9


def test_asks_each_rate_once_and_shares_rates_among_targets():
    asked = []

    def attainment(rate):
        asked.append(rate)
        return true_attainment(rate, 40.0)

    together = find_goodput(attainment, 1.0)
    assert len(asked) == len(set(asked)) == len(together.rates)
    shared = len(asked)
    apart = sum(len(find_goodput(attainment, 1.0, targets=[t]).rates) for t in (0.9, 0.95, 0.99))
    assert shared < apart


def test_noise_that_is_not_monotone_does_not_lead_astray():
    errors = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found = find_goodput(lambda rate, rng=rng: true_attainment(rate, 40.0) + rng.normal(0, 0.004), 10.0)
        errors.append(found.at(0.9).rate / true_goodput(40.0, 0.9) - 1)
    assert np.abs(errors).max() < 0.03
    assert abs(np.mean(errors)) < 0.01


def test_a_dip_at_a_low_rate_is_smoothed_over():
    result = goodput_of_curve([1, 2, 3, 4, 5], [0.99, 0.89, 0.99, 0.95, 0.2], 0.9)
    assert 4 < result.rate < 5
    assert (result.low, result.high) == (4, 5)


def test_out_of_reach_and_never_missed_are_said_so():
    never = find_goodput(lambda rate: 0.5, 1.0)
    assert (never.at(0.9).rate, never.at(0.9).low) == (0.0, 0.0)
    always = find_goodput(lambda rate: 1.0, 1.0, targets=[0.9])
    assert always.at(0.9).high is None


def test_a_plateau_below_the_target_ends_the_search_early_without_losing_the_lower_targets():
    found = find_goodput(lambda rate: 0.97 * true_attainment(rate, 40.0), 64.0)
    assert found.at(0.99).rate == 0.0
    assert found.at(0.9).rate == pytest.approx(true_goodput(40.0, 0.9 / 0.97), rel=0.01)
    assert len(found.rates) < 30


def test_a_result_survives_json():
    import json

    found = find_goodput(lambda rate: true_attainment(rate, 3.0), 1.0)
    assert json.loads(json.dumps(found.as_dict()))["goodput"][0]["target"] == 0.9
