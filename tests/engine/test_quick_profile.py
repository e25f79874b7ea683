"""The profile measured at start: finite, in order, and near what a step really takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from live_cases import MODEL

from engine.calibration.quick import measure
from engine.kernels import Spans
from engine.latency.evaluate import decode_s, prefill_s
from engine.model import ModelRunner


def law(spans: Spans) -> float:
    """Seconds of a step on the clock of this test."""
    if spans.starts.any():
        return 3e-4 + 2e-5 * len(spans) + 1e-7 * float(spans.starts.sum())
    return 2e-4 + 1e-5 * float(spans.counts.sum())


def test_predictions_are_what_steps_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real steps on a clock that follows a known law: the profile is that law."""
    clock, batch = [0.0], ModelRunner.batch

    def timed(self: ModelRunner, spans: Spans, sm_count: int) -> Any:
        clock[0] += law(spans)
        return batch(self, spans, sm_count=sm_count)

    monkeypatch.setattr(ModelRunner, "batch", timed)
    monkeypatch.setattr("engine.calibration.quick.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    profile, share = measure(MODEL)
    p, s = profile[0], share[0, 0]
    tokens = np.array([1.0, 16.0, 64.0, 256.0, 1024.0])
    np.testing.assert_allclose([prefill_s(p, s, n * n, 0.0, n) for n in tokens], 2e-4 + 1e-5 * tokens, rtol=1e-6)
    for sequences, context in ((1, 32), (10, 320)):
        expected = 3e-4 + 2e-5 * sequences + 1e-7 * context
        assert decode_s(p, s, context, sequences) == pytest.approx(expected, rel=1e-6)
    assert (p["n_layers"], p["n_shares"]) == (MODEL.config.n_layers, 1)


def test_whatever_the_machine_says_times_grow_with_the_work() -> None:
    profile, share = measure(MODEL)
    p, s = profile[0], share[0, 0]
    times = [prefill_s(p, s, float(n * n), 0.0, float(n)) for n in (1, 16, 64, 256, 1024)]
    assert np.isfinite(times).all()
    assert times[0] >= 0
    assert (np.diff(times) > 0).all()
    assert 0 < decode_s(p, s, 32, 1) <= decode_s(p, s, 320, 10)
