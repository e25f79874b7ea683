"""A rough latency profile of the model at hand, measured in a second or two: enough to decide by.

Policies predict with a profile. Where none is given, a few steps are timed and straight lines drawn through them.
What is measured once and kept, with held-out error and shares of the device, is a calibrated profile instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from engine.calibration.bench import Bench
from engine.calibration.points import Point
from engine.latency.rough import device_tables, relative_nnls
from engine.model.config import ModelConfig
from engine.model.llama import Llama

_PREFILL_TOKENS = (16, 64, 192)
_DECODE = ((1, 32), (1, 192), (4, 32), (8, 32), (8, 96))  # sequences, context tokens of each
_BLOCK = 16
_TINY_S = 1e-9


def _best_s(step: Callable[[], object], tries: int = 3) -> float:
    """Least seconds of ``step``, warmed up before."""
    step()
    seconds = []
    for _ in range(tries):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def measure(model: Llama, *, eager: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Time a few steps of ``model`` on an otherwise idle device, as an engine runs them.

    :param eager: as one without graphs does
    :return: PROFILE (1,) and SHARE (1, 1): one share, the whole device; nothing but step times is in it
    """
    config, weights = model.config, model.embed.weight
    most = max(b for b, _ in _DECODE)
    blocks = -(-max(b * (c + 1) for b, c in _DECODE) // _BLOCK) + len(_DECODE) * 8
    bench = Bench(model, kv_tokens=max(blocks * _BLOCK, *_PREFILL_TOKENS), max_batch=most, eager=eager)
    try:
        return _measured(config, weights.dtype.itemsize, bench)
    finally:
        bench.close()


def _measured(config: ModelConfig, element_bytes: int, bench: Bench) -> tuple[np.ndarray, np.ndarray]:
    def timed(point: Point) -> float:
        spans = bench.spans(point)
        return _best_s(lambda: bench.step(spans))

    prefill = [timed(Point("prefill", n=n, prompts=1)) for n in _PREFILL_TOKENS]
    per_token, start = relative_nnls(np.array([[float(n), 1.0] for n in _PREFILL_TOKENS]), np.array(prefill))
    decode = [timed(Point("decode", bs=sequences, ctx=context)) for sequences, context in _DECODE]
    rows = np.array([[float(b * c), float(b), 1.0] for b, c in _DECODE])
    per_context, per_sequence, base = relative_nnls(rows, np.array(decode))

    profile, share = device_tables(
        (0.0, 0.0, max(per_token, _TINY_S), start), (per_context, per_sequence, max(base, _TINY_S)),
        n_layers=config.n_layers,
    )  # fmt: skip
    profile["kv_bytes_per_token"] = config.kv_elements_per_token * element_bytes
    profile["migrate_latency_s"] = 1e-3
    share["fused_shared_s"] = base
    return profile, share
