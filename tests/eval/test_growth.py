"""What the soak calls growth: what happens in every round, not what happens once."""

from __future__ import annotations

import numpy as np
import pytest

from eval.benchmarks.growth import growth_of
from eval.benchmarks.soak import _MOST_GROWTH_MB, _settled

ROUNDS = 60


def noise(seed: int, mb: float) -> np.ndarray:
    return np.random.default_rng(seed).normal(700.0, mb, ROUNDS)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mb", [0.3, 2.0, 5.0])
def test_a_leak_is_found_in_the_noise(seed: int, mb: float) -> None:
    growth = growth_of(noise(seed, 0.5) + mb * np.arange(ROUNDS))
    assert growth.low <= mb <= growth.high
    assert growth.low > _MOST_GROWTH_MB


@pytest.mark.parametrize("seed", range(5))
def test_a_leak_in_jumps_is_found(seed: int) -> None:
    jumps = np.random.default_rng(seed).poisson(1.0, ROUNDS) * 2.1  # as thread buffers of 2.1 MB are lost
    growth = growth_of(700.0 + jumps.cumsum())
    assert growth.low > _MOST_GROWTH_MB
    assert growth.slope == pytest.approx(2.1, rel=0.5)


@pytest.mark.parametrize("seed", range(5))
def test_what_happens_once_is_no_growth(seed: int) -> None:
    flat = noise(seed, 0.5)
    step, outlier = flat.copy(), flat.copy()
    step[40:] += 1.0
    outlier[30] += 100.0
    assert growth_of(outlier).slope == pytest.approx(growth_of(flat).slope, abs=0.01)
    for figures in (flat, step, outlier):
        assert growth_of(figures).low <= _MOST_GROWTH_MB


def test_the_warm_up_does_not_count() -> None:
    memory = [500.0, 550.0, 580.0, 600.0, 610.0, 612.0, *[612.0] * 24]
    assert growth_of(_settled(memory)) == (0.0, 0.0, 0.0)
    assert [len(_settled([1.0] * n)) for n in (3, 4, 10, 100)] == [3, 3, 7, 80]
