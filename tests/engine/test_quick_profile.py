"""The profile measured at start: finite, in order, and near what a step really takes."""

from __future__ import annotations

import time

import numpy as np
from live_cases import MODEL

from engine.calibration.quick import measure
from engine.kernels import Span
from engine.latency.evaluate import decode_s, prefill_s
from engine.model import KVPool, ModelRunner, SamplingParams


def test_predictions_are_near_what_steps_take() -> None:
    profile, share = measure(MODEL)
    p, s = profile[0], share[0, 0]
    times = [prefill_s(p, s, float(n * n), 0.0, float(n)) for n in (1, 16, 64, 256, 1024)]
    assert np.isfinite(times).all()
    assert times[0] >= 0
    assert (np.diff(times) > 0).all()
    assert 0 < decode_s(p, s, 32, 1) <= decode_s(p, s, 320, 10)
    runner = ModelRunner(MODEL, KVPool(MODEL.config, blocks=16, block_tokens=16))
    taken = []
    for _ in range(5):
        begin = time.perf_counter()
        runner.run(runner.batch([Span([1] * 128, 0, range(8))]), [SamplingParams(temperature=0.0)], [0])
        taken.append(time.perf_counter() - begin)
    assert 0.2 < prefill_s(p, s, 128.0**2, 0.0, 128.0) / min(taken) < 5.0
    assert (profile["n_layers"][0], profile["n_shares"][0]) == (MODEL.config.n_layers, 1)
