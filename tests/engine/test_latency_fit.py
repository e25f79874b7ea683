"""Fitting: known coefficients come back from noisy data, structure appears only where data ask for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.errors import SlalomError
from engine.latency import Profile
from engine.latency.fit import DecodeSamples, PrefillSamples, fit_decode, fit_prefill, fit_profile


def prefill_samples(noise: float, coefficients: tuple[float, float, float, float]) -> PrefillSamples:
    rng = np.random.default_rng(1)
    n, r = np.meshgrid([64, 128, 256, 512, 1024, 2048, 4096, 8192], [0, 1024, 8192])
    n, r = n.ravel(), r.ravel()
    a, b, c, d = coefficients
    seconds = (a * n**2.0 + b * n * r + c * n + d) * (1 + noise * rng.standard_normal(n.shape))
    return PrefillSamples(n, r, seconds)


def decode_samples(noise: float = 0.0, jump: float = 0.0) -> DecodeSamples:
    rng = np.random.default_rng(2)
    bs, ctx = np.meshgrid([1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256], [64, 512, 2048])
    bs, ctx = bs.ravel(), (bs * ctx).ravel()
    seconds = 8e-8 * ctx + 4e-5 * bs + 1e-2 + jump * (bs >= 96)
    return DecodeSamples(ctx, bs, seconds * (1 + noise * rng.standard_normal(bs.shape)))


def test_exact_prefill_is_recovered() -> None:
    truth = (1.5e-9, 3e-9, 6.6e-5, 5.6e-3)
    fit = fit_prefill(prefill_samples(0.0, truth))
    np.testing.assert_allclose(fit.coefficients, truth, rtol=1e-6)
    assert fit.held_out_mape < 1e-9
    assert fit.knot_tokens == ()


def test_noisy_prefill_is_recovered_within_its_noise() -> None:
    truth = (1.5e-9, 3e-9, 6.6e-5, 5.6e-3)
    fit = fit_prefill(prefill_samples(0.01, truth))
    np.testing.assert_allclose(fit.coefficients, truth, rtol=0.15)
    assert 0.001 < fit.held_out_mape < 0.04


def test_batches_of_equal_prompts_count_every_prompt() -> None:
    n, bs = np.repeat([256, 512, 1024, 2048], 4), np.tile([1, 2, 4, 8], 4)
    seconds = 2e-9 * bs * n**2.0 + 5e-5 * bs * n + 3e-3
    fit = fit_prefill(PrefillSamples(n, 0 * n, seconds, bs=bs))
    np.testing.assert_allclose(fit.coefficients, (2e-9, 0.0, 5e-5, 3e-3), rtol=1e-6, atol=1e-15)


def test_a_bent_curve_gets_knots_and_a_smaller_error() -> None:
    """A device that is slow to fill: flat to 512 tokens, steep, then less steep (no quadratic does that)."""
    n = np.unique(np.geomspace(32, 16384, 60).astype(int))
    seconds = np.interp(n, [0, 512, 2048, 4096, 16384], [0.05, 0.05, 0.30, 0.45, 1.0])
    samples = PrefillSamples(n, 0 * n, seconds)
    quadratic, fit = fit_prefill(samples, knots=False), fit_prefill(samples)
    assert quadratic.held_out_mape > 0.05
    assert fit.held_out_mape < 0.5 * quadratic.held_out_mape
    assert 3 <= len(fit.knot_tokens) == len(fit.knot_s) <= 8
    assert list(fit.knot_s) == sorted(fit.knot_s)
    assert fit.knot_s[0] > 0.04


def test_one_regime_unless_the_data_jump() -> None:
    assert fit_decode(decode_samples(noise=0.01)).large is None
    fit = fit_decode(decode_samples(noise=0.01, jump=8e-3))
    assert fit.large is not None
    assert 64 < fit.regime_bs <= 96
    assert fit.held_out_mape < 0.02


def test_a_regime_of_another_share_that_leaves_either_side_too_few_points_is_left_out() -> None:
    samples = DecodeSamples(np.full(8, 1000), np.array([1, 2, 3, 40, 50, 60, 1, 40]), np.full(8, 0.01))
    for seed in range(20):  # which points are held out differs
        assert fit_decode(samples, regime_bs=10, seed=seed).held_out_mape < 1e-6


def test_same_seed_same_fit() -> None:
    samples = decode_samples(noise=0.02)
    assert fit_decode(samples, seed=3) == fit_decode(samples, seed=3)
    assert fit_decode(samples, seed=3) != fit_decode(samples, seed=4)


@pytest.mark.parametrize("value", [0.0, -1e-3, float("nan"), float("inf")])
def test_impossible_times_are_refused(value: float) -> None:
    samples = decode_samples()
    samples.seconds[3] = value
    with pytest.raises(SlalomError, match="seconds"):
        fit_decode(samples)


def test_too_few_or_unequal_points_are_refused() -> None:
    with pytest.raises(SlalomError, match="at least 8"):
        fit_prefill(PrefillSamples(np.arange(1, 6), np.zeros(5), np.ones(5)))
    with pytest.raises(SlalomError, match="at least one token"):
        fit_prefill(PrefillSamples(np.arange(9), np.zeros(9), np.linspace(1.0, 9.0, 9) % 2 + 1))
    with pytest.raises(SlalomError, match="one length"):
        fit_prefill(PrefillSamples(np.arange(1, 20), np.zeros(19), np.ones(18)))


def facts() -> dict[str, Any]:
    """Every field of a profile that is not fitted."""
    shipped = Profile.load("llama-8b-a100")
    fitted = {"shares", "regime_bs", "fit"}
    return {field: getattr(shipped, field) for field in type(shipped).model_fields if field not in fitted}


def with_sms(samples: Any, slow: dict[int, float]) -> Any:
    """The samples repeated per SM count, slower by the factor given."""
    columns = {name: np.tile(value, len(slow)) for name, value in vars(samples).items() if value is not None}
    points = len(samples.seconds)
    columns["seconds"] = np.concatenate([samples.seconds * factor for factor in slow.values()])
    columns["sms"] = np.repeat(list(slow), points)
    return type(samples)(**columns)


def test_a_profile_is_fitted_per_share() -> None:
    prefill = with_sms(prefill_samples(0.01, (1.5e-9, 3e-9, 6.6e-5, 5.6e-3)), {54: 2.0, 108: 1.0})
    decode = with_sms(decode_samples(0.01), {54: 1.3, 108: 1.0})
    profile = fit_profile(prefill, decode, facts=facts(), share_facts={108: {"guard": 1.1}})
    assert [share.sms for share in profile.shares] == [54, 108]
    assert profile.shares[-1].guard == 1.1
    assert profile.prefill_s(4096, sms=54) / profile.prefill_s(4096) == pytest.approx(2.0, rel=0.03)
    assert profile.fit is not None
    assert 0 < profile.fit.prefill_mape < 0.03
    assert profile.fit.n_prefill == len(prefill.n)


def test_a_fit_that_beats_the_roofline_is_refused() -> None:
    with pytest.raises(SlalomError, match="roofline"):
        fit_profile(prefill_samples(0.0, (0.0, 0.0, 2e-5, 1e-3)), decode_samples(), facts=facts())


def test_both_phases_must_be_measured_on_every_share() -> None:
    prefill = with_sms(prefill_samples(0.0, (0.0, 0.0, 6.6e-5, 5e-3)), {54: 2.0, 108: 1.0})
    with pytest.raises(SlalomError, match="54"):
        fit_profile(prefill, decode_samples(), facts=facts())
