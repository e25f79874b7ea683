"""TTFT and ITL tables of a latency profile, packed behind a rule's parameters.

Planners look latencies up in profiled tables (DOPD, Dynamo: TTFT over prompt length, ITL over concurrency
and context). ``profile_block`` samples them once; the kernels read them out of the params array at offset
``at``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from engine.jit.kernel import kernel
from engine.latency.evaluate import prefill_s
from policies.rule import Param, Setting, Values

_GRID = np.geomspace(64, 131072, 23).round()
_N = len(_GRID)
#: kv tokens, batch limit, TPOT target, regime, 3 + 3 decode coefficients, grid, TTFT on the grid
_KV, _MAX_BATCH, _TPOT, _REGIME, _SMALL, _LARGE, _TOKENS, _SECONDS = 0, 1, 2, 3, 4, 7, 10, 10 + _N
PROFILE_CELLS = 10 + 2 * _N


def profile_block(setting: Setting) -> np.ndarray:
    """The tables of the first instance's profile on its whole device, float64 (PROFILE_CELLS,).

    KV capacity and batch limit are the least of all instances, the TPOT target the tightest class's
    (inferred: the planners know one target).
    """
    row = setting.profile_of[0]
    profile = setting.profile.view(np.recarray)[row]
    share = setting.share.view(np.recarray)[row, max(int(profile.n_shares) - 1, 0)]
    overhead = float(profile.step_overhead_s)
    curve: Any = prefill_s
    block = np.zeros(PROFILE_CELLS)
    block[_KV] = min(setting.kv_tokens)
    block[_MAX_BATCH] = min(setting.max_batch)
    block[_TPOT] = min(c.tpot_s for c in setting.classes)
    block[_REGIME] = float(profile.regime_bs)
    for at, name in ((_SMALL, "decode_small"), (_LARGE, "decode_large")):
        block[at : at + 3] = share[name]
        block[at] += float(profile.ctx_overhead_s)
        block[at + 2] += overhead
    block[_TOKENS : _TOKENS + _N] = _GRID
    block[_SECONDS : _SECONDS + _N] = [curve.py_func(profile, share, n * n, 0.0, n) + overhead for n in _GRID]
    return block


def with_tables(params: tuple[Param, ...]) -> Callable[[Values, Setting], np.ndarray]:
    """``prepare`` of a rule whose params array holds the values of ``params`` and behind them the tables."""

    def prepare(values: Values, setting: Setting) -> np.ndarray:
        return np.concatenate([[p.number(values[p.name]) for p in params], profile_block(setting)])

    return prepare


@kernel
def kv_tokens(params, at):
    """KV capacity of one instance, tokens."""
    return params[at + _KV]


@kernel
def tpot_slo(params, at):
    """Tightest TPOT target, seconds."""
    return params[at + _TPOT]


@kernel
def ttft_prof(params, at, isl):
    """TTFT_prof(isl): isolated prefill of ``isl`` tokens, seconds; linear between grid points and beyond."""
    i = 1
    while i < _N - 1 and params[at + _TOKENS + i] < isl:
        i += 1
    x0, x1 = params[at + _TOKENS + i - 1], params[at + _TOKENS + i]
    y0, y1 = params[at + _SECONDS + i - 1], params[at + _SECONDS + i]
    return max(y0 + (max(isl, x0) - x0) * (y1 - y0) / (x1 - x0), 1e-6)


@kernel
def itl_prof(params, at, bs, ctx):
    """ITL_prof(bs, ctx): decode step of ``bs`` sequences of ``ctx`` tokens each, seconds."""
    row = at + (_LARGE if bs >= params[at + _REGIME] else _SMALL)
    return max(params[row] * bs * ctx + params[row + 1] * bs + params[row + 2], 1e-6)


@kernel
def _crossing(params, row, ctx, limit_s):
    return np.floor((limit_s - params[row + 2]) / max(params[row] * ctx + params[row + 1], 1e-12) + 1e-9)


@kernel
def largest_batch(params, at, ctx, limit_s):
    """The largest batch whose step stays within ``limit_s``, at least 1 and within the batch limit."""
    regime = params[at + _REGIME]
    bs = _crossing(params, at + _LARGE, ctx, limit_s)
    if bs < regime:
        bs = min(_crossing(params, at + _SMALL, ctx, limit_s), regime - 1.0)
    return max(min(bs, params[at + _MAX_BATCH]), 1.0)
