"""Lengths of prompts and answers against published figures."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import TypeAdapter
from scipy.stats import spearmanr

from env.workload.presets import LengthsSpec, preset, preset_facts, preset_names

LENGTHS: TypeAdapter = TypeAdapter(LengthsSpec)


PUBLISHED = {  # mean, p50, p90, p99 in and out, as published with the traces
    "azure-conv": ((1203, 1016, 4075, 4122), (201, 115, 421, 598)),
    "azure-code": ((2028, 1460, 5026, 7436), (27.5, 13, 55, 249)),
    "mooncake-conversation": ((12449, 7284, 28043, 89976), (348, 356, 606, 1166)),
    "servegen-m-large": ((930, 639, 2380, 4149), (151, 49, 460, 718)),
    "servegen-m-small": ((117, 41, 344, 1440), (16.6, 3, 48, 150)),
    "servegen-deepseek-r1": ((1375, 152, 2847, 24820), (1828, 1051, 4348, 13596)),
    "creation": ((308, 309, 400, 566), (1144, 1106, 1708, 2341)),
    "lmsys": ((62, 17, 177, 586), (162, 117, 389, 533)),
    "sharegpt": ((224, 34, 922, 1608), (278, 268, 510, 767)),
    "humaneval": ((156, 135, 261, 362), (66, 54, 127, 195)),
    "loogle": ((27396, 25276, 42469, 45099), (27.5, 21, 44, 219)),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_presets_reproduce_published_lengths(name: str) -> None:
    """Mean within 7 %, p50 and p90 within 4 % (or one token), p99 within 8 %."""
    for tokens, (mean, p50, p90, p99) in zip(
        preset(name).draw(200_000, np.random.default_rng(0)), PUBLISHED[name], strict=True
    ):
        assert tokens.mean() == pytest.approx(mean, rel=0.07)
        assert np.median(tokens) == pytest.approx(p50, rel=0.04, abs=1)
        assert np.percentile(tokens, 90) == pytest.approx(p90, rel=0.04)
        assert np.percentile(tokens, 99) == pytest.approx(p99, rel=0.08)
    assert {"source", "licence"} <= set(preset_facts(name))


def test_presets_without_a_table() -> None:
    rng = np.random.default_rng(0)
    prompt, output = preset("tool-agent").draw(100_000, rng)
    assert prompt.mean() == pytest.approx(8596, rel=0.03)
    assert output.mean() == pytest.approx(182, rel=0.05)
    prompt, output = preset("burstgpt").draw(100_000, rng)
    assert (prompt.mean(), output.mean()) == pytest.approx((763, 348), rel=0.02)
    prompt, _ = preset("longbench").draw(10_000, rng)
    assert (prompt.min(), prompt.max()) == (1900, 2040)
    assert {"azure-conv", "longbench", "tool-agent"} <= set(preset_names())
    assert "longbench-answers" not in preset_names()


def test_creation_keeps_its_rank_correlation() -> None:
    prompt, output = preset("creation").draw(50_000, np.random.default_rng(0))
    assert spearmanr(prompt, output)[0] == pytest.approx(0.713, abs=0.02)


@pytest.mark.parametrize("rho", [-0.6, 0.3, 1.0])
def test_copula_hits_spearman_and_keeps_the_marginals(rho: float) -> None:
    section = {
        "kind": "joint",
        "prompt": {"kind": "lognormal", "median": 500, "mean": 900},
        "output": {"kind": "uniform", "low": 1, "high": 5000},
        "spearman": rho,
    }
    prompt, output = LENGTHS.validate_python(section).draw(200_000, np.random.default_rng(2))
    assert spearmanr(prompt, output)[0] == pytest.approx(rho, abs=0.01)
    assert np.median(prompt) == pytest.approx(500, rel=0.02)
    assert prompt.mean() == pytest.approx(900, rel=0.03)
    assert output.mean() == pytest.approx(2500.5, rel=0.01)


def test_mixture_draws_by_weight() -> None:
    fixed = [{"kind": "fixed", "prompt": p, "output": 1} for p in (10, 20)]
    section = {
        "kind": "mixture",
        "parts": [{"weight": w, "lengths": f} for w, f in zip((1, 3), fixed, strict=True)],
    }
    prompt, _ = LENGTHS.validate_python(section).draw(50_000, np.random.default_rng(0))
    assert (prompt == 20).mean() == pytest.approx(0.75, abs=0.01)
