"""Arrival processes against theory."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import TypeAdapter
from scipy.stats import kstest
from trace_stats import gap_cv, idc

from env.workload.arrivals import ArrivalSpec, on_clock, weibull_shape

ARRIVAL: TypeAdapter = TypeAdapter(ArrivalSpec)


def times(section: dict, rate: float, n: int, seed: int = 0) -> np.ndarray:
    out = ARRIVAL.validate_python(section).times(rate, n, np.random.default_rng(seed))
    assert len(out) == n
    assert (np.diff(out) >= 0).all()
    assert out[0] >= 0
    return out


@pytest.mark.parametrize(
    ("section", "cv"),
    [
        ({"kind": "poisson"}, 1.0),
        ({"kind": "gamma", "cv": 0.5}, 0.5),
        ({"kind": "gamma", "cv": 4.0}, 4.0),
        ({"kind": "weibull", "cv": 0.5}, 0.5),
        ({"kind": "weibull", "cv": 2.0}, 2.0),
    ],
)
def test_renewal_mean_cv_and_long_run_idc(section: dict, cv: float) -> None:
    out = times(section, 5.0, 200_000)
    assert 200_000 / out[-1] == pytest.approx(5.0, rel=0.03)
    assert gap_cv(out) == pytest.approx(cv, rel=0.05)
    assert idc(out, 100.0) == pytest.approx(cv * cv, rel=0.25)  # renewal theory: IDC tends to CV^2


def test_weibull_shape_of_cv_one_is_exponential_and_small_cvs_solve() -> None:
    assert weibull_shape(1.0) == pytest.approx(1.0)
    assert weibull_shape(np.sqrt(5.0)) == pytest.approx(0.5)  # shape 1/2: G(5)/G(3)^2 - 1 = 5
    assert 0.05 < weibull_shape(30.0) < weibull_shape(0.05) < 50


def test_poisson_gaps_are_exponential() -> None:
    assert kstest(np.diff(times({"kind": "poisson"}, 2.0, 5000)) * 2.0, "expon").pvalue > 0.01


def test_azure_code_like_bursts() -> None:
    """Figures of AzureLLMInferenceTrace_code (2023): IDC 13.1, 70 and 160 at 1, 10 and 60 s; within 35 %."""
    out = times({"kind": "on_off", "on_s": 60, "off_s": 90, "cv": 3.5}, 3.12, 150_000)
    assert [idc(out, w) for w in (1, 10, 60)] == pytest.approx([13.1, 70, 160], rel=0.35)


@pytest.mark.parametrize("off_rate", [0.0, 0.2])
def test_on_off_counts_follow_the_mmpp_formula(off_rate: float) -> None:
    on_s, off_s, rate = 2.0, 3.0, 20.0
    out = times({"kind": "on_off", "on_s": on_s, "off_s": off_s, "off_rate": off_rate}, rate, 600_000)
    a, b = 1 / on_s, 1 / off_s
    peak = rate / (0.4 + 0.6 * off_rate)
    low = peak * off_rate
    limit = 2 * (peak - low) ** 2 * a * b / ((a + b) ** 2 * (peak * b + low * a))
    assert 600_000 / out[-1] == pytest.approx(rate, rel=0.05)
    for window in (0.5, 5.0, 50.0):  # Fischer and Meier-Hellstern 1993, IDC of counts of an MMPP-2
        x = (a + b) * window
        assert idc(out, window) == pytest.approx(1 + limit * (1 - (1 - np.exp(-x)) / x), rel=0.1)


def test_bins_and_sinusoid_put_the_rate_where_they_say() -> None:
    out = times({"kind": "bins", "bin_s": 10, "rates": [0, 1, 3, 0]}, 10.0, 100_000)
    share = np.bincount((out % 40 // 10).astype(int), minlength=4) / len(out)
    assert share == pytest.approx([0, 0.25, 0.75, 0], abs=0.01)
    assert len(out) / out[-1] == pytest.approx(10.0, rel=0.02)
    out = times({"kind": "sinusoid", "amplitude": 0.8, "period_s": 20}, 10.0, 100_000)
    angle = 2 * np.pi * (out % 20) / 20
    assert 2 * np.sin(angle).mean() == pytest.approx(0.8, abs=0.02)  # first Fourier coefficient of lambda(t)
    assert abs(np.cos(angle).mean()) < 0.02


def test_clock_inverts_the_integral_of_the_rate() -> None:
    out = on_clock(np.array([0.0, 1.0, 2.0, 2.5, 9.0]), np.array([0.0, 2.0, 5.0, 6.0]), np.array([1.0, 0.0, 2.0]))
    assert out == pytest.approx([0.0, 1.0, 2.0, 5.25, 8.5])


def test_until_is_the_beginning_of_a_longer_run() -> None:
    process = ARRIVAL.validate_python({"kind": "gamma", "cv": 5.0})
    out = process.until(3.0, 500.0, np.random.default_rng(1))
    longer = process.times(3.0, 4 * len(out), np.random.default_rng(1))
    assert np.array_equal(out, longer[longer < 500.0])
