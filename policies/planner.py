"""What planners of the prefill:decode ratio share: interval statistics, forecasts, and one role change at a
time.

The core asks REALLOCATE every control interval (1 s by default); a planner acts on longer intervals, so
windows are added up in memory. Published planners start and stop instances within a GPU budget. Here the
fleet is fixed and an instance changes its role, so the N_P and N_D that a planner wants are fitted to the
fleet (inferred).
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Ctx
from engine.core.jit import kernel
from engine.core.state import Role
from policies.common import hold
from policies.forecast import METHODS, SERIES_CELLS, forecast, push
from policies.rule import Param

__all__ = [
    "ISL",
    "ITL",
    "MEMORY_CELLS",
    "OSL",
    "PLANNER_PARAMS",
    "RATE",
    "TTFT",
    "close_interval",
    "count_roles",
    "fit_fleet",
    "flip",
    "interval_over",
    "observe",
    "predicted",
    "settle",
    "towards",
]

_PREFILL, _DECODE = int(Role.PREFILL), int(Role.DECODE)
#: Memory: the interval so far, the plan, means of the last interval, three series.
_SPAN, _ARRIVED, _PROMPTS, _OUT, _OUT_W, _TTFT_SUM, _TTFT_W, _TPOT_SUM, _TPOT_W = range(9)
_TARGET, _STREAK, _SIDE, _ROLES = range(9, 13)
#: Means over the last complete interval, in memory: seconds, requests per second, tokens.
TTFT, ITL, RATE, ISL, OSL = range(13, 18)
_SERIES = 18
MEMORY_CELLS = _SERIES + 3 * SERIES_CELLS

#: Every planner's first parameters, in this order.
PLANNER_PARAMS = (
    Param("interval_s", 1.0, 180.0, 10.0, log=True, doc="planning interval T; configs use 10 to 20 s"),
    Param("patience", 1, 10, 3, integer=True, doc="intervals that must agree before a role changes (inferred)"),
    Param("forecast", default="ari", choices=METHODS, doc="of prompt, output and rate; published: auto-ARIMA"),
)


@kernel
def observe(context, memory):
    """Add the last control window to the interval. What nobody measured (no request ended) has no weight."""
    span = context[Ctx.WIN_SPAN_S]
    arrived = context[Ctx.WIN_RATE] * span
    memory[_SPAN] += span
    memory[_ARRIVED] += arrived
    memory[_PROMPTS] += context[Ctx.WIN_PROMPT] * arrived
    if context[Ctx.WIN_OUTPUT] > 0.0:
        memory[_OUT] += context[Ctx.WIN_OUTPUT] * span
        memory[_OUT_W] += span
    if context[Ctx.WIN_TTFT_S] > 0.0:
        memory[_TTFT_SUM] += context[Ctx.WIN_TTFT_S] * span
        memory[_TTFT_W] += span
    if context[Ctx.WIN_TPOT_S] > 0.0:
        memory[_TPOT_SUM] += context[Ctx.WIN_TPOT_S] * span
        memory[_TPOT_W] += span


@kernel
def interval_over(memory, interval_s):
    """Whether the windows added up so far fill an interval."""
    return memory[_SPAN] >= interval_s * (1.0 - 1e-6)


@kernel
def close_interval(memory, roles):
    """Turn the sums into means and extend the series. False when nothing may be concluded from this interval:
    no request arrived or ended in it, or ``roles`` (a number that tells arrangements apart) changed."""
    useful = memory[_ARRIVED] > 0.0 and memory[_OUT_W] > 0.0 and memory[_TPOT_W] > 0.0
    if useful:
        memory[RATE] = memory[_ARRIVED] / memory[_SPAN]
        memory[ISL] = memory[_PROMPTS] / memory[_ARRIVED]
        memory[OSL] = memory[_OUT] / memory[_OUT_W]
        memory[TTFT] = memory[_TTFT_SUM] / max(memory[_TTFT_W], 1e-9)
        memory[ITL] = memory[_TPOT_SUM] / memory[_TPOT_W]
        for i in range(3):
            push(memory, _SERIES + i * SERIES_CELLS, memory[RATE + i])
    same = memory[_ROLES] == roles or memory[_ROLES] == 0.0
    memory[_ROLES] = roles
    for i in range(_TARGET):
        memory[i] = 0.0
    return useful and same


@kernel
def predicted(memory, which, method):
    """One-step forecast of RATE, ISL or OSL."""
    return forecast(memory, _SERIES + (which - RATE) * SERIES_CELLS, method)


@kernel
def count_roles(candidates):
    """(N_P, N_D): instances of role PREFILL and DECODE among the rows of a REALLOCATE decision."""
    n_p, n_d = 0, 0
    for k in range(candidates.shape[0]):
        role, new = int(candidates[k, Col.ROLE]), int(candidates[k, Col.NEW_ROLE])
        if candidates[k, Col.INSTANCE] >= 0.0:
            n_p += 1 if role == _PREFILL and new == _DECODE else 0
            n_d += 1 if role == _DECODE and new == _PREFILL else 0
    return n_p, n_d


@kernel
def fit_fleet(n_p, n_d, n):
    """N_P of a fleet of ``n`` for a plan (N_P, N_D).

    Over budget it shrinks by s = n / (N_P + N_D), N_P = max(1, int(N_P · s)), as DOPD's code does. Instances
    to spare are shared in proportion (inferred: a fixed fleet cannot hand them back).
    """
    if n < 2:
        return n
    s = n / max(n_p + n_d, 1.0)
    fitted = np.floor(n_p * s + 1e-9) if s < 1.0 else np.floor(n_p * s + 0.5)
    return int(min(max(fitted, 1.0), n - 1.0))


@kernel
def settle(memory, n_p, wanted, patience):
    """Hysteresis: make ``wanted`` the target after ``patience`` intervals in a row on its side of ``n_p``."""
    side = 1.0 if wanted > n_p else (-1.0 if wanted < n_p else 0.0)
    memory[_STREAK] = memory[_STREAK] + 1.0 if side == memory[_SIDE] else 1.0
    memory[_SIDE] = side
    if side == 0.0 or memory[_STREAK] >= patience:
        memory[_TARGET] = wanted


@kernel
def flip(candidates, mask, role, new):
    """Row that turns the least loaded instance of ``role`` into ``new``; -1 when none may change now."""
    best, load = -1, np.inf
    for k in range(candidates.shape[0]):
        if mask[k] == 0 or candidates[k, Col.INSTANCE] < 0.0:
            continue
        if int(candidates[k, Col.ROLE]) == role and int(candidates[k, Col.NEW_ROLE]) == new:
            here = candidates[k, Col.OUTSTANDING]
            if best < 0 or here < load:
                best, load = k, here
    return best


@kernel
def towards(candidates, mask, memory, n_p):
    """One role change towards the target N_P; KEEP at the target, without one, or during a change."""
    target = int(memory[_TARGET])
    row = -1
    if target > n_p:
        row = flip(candidates, mask, _DECODE, _PREFILL)
    elif 0 < target < n_p:
        row = flip(candidates, mask, _PREFILL, _DECODE)
    return row if row >= 0 else hold(candidates, mask)
