"""What planners of the prefill:decode ratio share: interval statistics, forecasts, and one role change at a
time.

The core asks REALLOCATE every control interval (1 s by default); a planner acts on longer intervals, so
windows are added up in memory. Published planners start and stop instances within a GPU budget. Here the
fleet is fixed and an instance changes its role, so the N_P and N_D that a planner wants are fitted to the
fleet (inferred). A planner's answer to REALLOCATE is

    if interval_closed(context, candidates, params, memory):
        adopt(candidates, params, memory, N_P, N_D)      # its own equations
    return follow(candidates, mask, memory)
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Ctx
from engine.core.kinds import Role
from engine.jit.kernel import kernel
from policies.common import hold
from policies.rule import Param
from policies.rules.parts.forecast import METHODS, SERIES_CELLS, forecast, push

_PREFILL, _DECODE = int(Role.PREFILL), int(Role.DECODE)
#: Memory: the interval so far, the plan, means of the last interval, three series.
_SPAN, _ARRIVED, _PROMPTS, _OUT, _OUT_W, _TTFT_SUM, _TTFT_W, _TPOT_SUM, _TPOT_W = range(9)
_TARGET, _STREAK, _SIDE, _ROLES = range(9, 13)
#: Means over the last complete interval, in memory: seconds, requests per second, tokens.
TTFT, ITL, RATE, ISL, OSL = range(13, 18)
#: One-step forecasts of RATE, ISL, OSL, and whether a library is still to make them (1) or has (2).
AHEAD, PENDING = 18, 21
SERIES = 22
MEMORY_CELLS = SERIES + 3 * SERIES_CELLS

#: Forecast by a library, chosen by name and never drawn by a search: see ``policies.rules.parts.arima``.
LIBRARY = "auto_arima"
_LIBRARY = len(METHODS)

#: Every planner's first parameters, in this order.
PLANNER_PARAMS = (
    Param("interval_s", 1.0, 180.0, 10.0, log=True, doc="planning interval T; configs use 10 to 20 s"),
    Param("patience", 1, 10, 3, integer=True, doc="intervals that must agree before a role changes (inferred)"),
    Param(
        "forecast",
        default="ari",
        choices=METHODS,
        by_hand=(LIBRARY,),
        doc="of prompt, output and rate; published: auto_arima (needs the extra 'forecast', slow)",
    ),
)


@kernel
def _observe(context, memory):
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
def _close(memory, method):
    """Turn the sums into means, extend the series and look ahead. False when the interval says nothing: no request
    arrived or ended in it."""
    useful = memory[_ARRIVED] > 0.0 and memory[_OUT_W] > 0.0 and memory[_TPOT_W] > 0.0
    if useful:
        memory[RATE] = memory[_ARRIVED] / memory[_SPAN]
        memory[ISL] = memory[_PROMPTS] / memory[_ARRIVED]
        memory[OSL] = memory[_OUT] / memory[_OUT_W]
        memory[TTFT] = memory[_TTFT_SUM] / max(memory[_TTFT_W], 1e-9)
        memory[ITL] = memory[_TPOT_SUM] / memory[_TPOT_W]
        for i in range(3):
            at = SERIES + i * SERIES_CELLS
            push(memory, at, memory[RATE + i])
            memory[AHEAD + i] = forecast(memory, at, int(min(method, _LIBRARY - 1)))
    for i in range(_TARGET):
        memory[i] = 0.0
    return useful


@kernel
def interval_closed(context, candidates, params, memory):
    """Add the last control window; True when an interval of ``params[0]`` seconds has ended that may be planned on.

    It may not when nothing was measured in it, or the roles changed meanwhile (as in DOPD's code). ``params``
    start with PLANNER_PARAMS. With a library's forecast the answer is False once, ``memory[PENDING]`` asks
    for it, and the question is put again.
    """
    if memory[PENDING] == 2.0:
        memory[PENDING] = 0.0
        return True
    _observe(context, memory)
    if memory[_SPAN] < params[0] * (1.0 - 1e-6):
        return False
    useful = _close(memory, params[2])
    roles = count_roles(candidates)[0] + 1.0
    same = memory[_ROLES] == roles or memory[_ROLES] == 0.0
    memory[_ROLES] = roles
    if useful and params[2] == _LIBRARY:
        # Placement reads the forecasts too, so they are made even when the plan has to wait.
        memory[PENDING] = 1.0 if same else 3.0
        return False
    return useful and same


@kernel
def predicted(memory, which):
    """Forecast of RATE, ISL or OSL for the interval now running; 0 before the first."""
    return memory[AHEAD + which - RATE]


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
def count_prefill(candidates):
    """Instances that prefill only once the role changes under way are done, among the rows of a REALLOCATE decision."""
    n = 0
    for k in range(candidates.shape[0]):
        role, new = int(candidates[k, Col.ROLE]), int(candidates[k, Col.NEW_ROLE])
        if candidates[k, Col.INSTANCE] >= 0.0 and new == (_DECODE if role == _PREFILL else _PREFILL):
            after = int(candidates[k, Col.BECOMES]) - 1
            n += 1 if (role if after < 0 else after) == _PREFILL else 0
    return n


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
def adopt(candidates, params, memory, n_p, n_d):
    """Make a plan (N_P, N_D), fitted to the fleet, the target: after ``params[1]`` intervals in a row that lie on
    the same side of what is."""
    have_p, have_d = count_roles(candidates)
    wanted = fit_fleet(n_p, n_d, have_p + have_d)
    side = 1.0 if wanted > have_p else (-1.0 if wanted < have_p else 0.0)
    memory[_STREAK] = memory[_STREAK] + 1.0 if side == memory[_SIDE] else 1.0
    memory[_SIDE] = side
    if side == 0.0 or memory[_STREAK] >= params[1]:
        memory[_TARGET] = wanted


@kernel
def flip(candidates, mask, role, new, profile=-1):
    """Row that turns the least loaded instance of ``role`` and ``profile`` (-1: of any) into ``new``; -1 when none
    may change now."""
    best, load = -1, np.inf
    for k in range(candidates.shape[0]):
        if mask[k] == 0 or candidates[k, Col.INSTANCE] < 0.0 or int(candidates[k, Col.NEW_ROLE]) != new:
            continue
        if profile >= 0 and int(candidates[k, Col.PROFILE]) != profile:
            continue
        if role >= 0 and int(candidates[k, Col.ROLE]) != role:
            continue
        if candidates[k, Col.OUTSTANDING] < load:
            best, load = k, candidates[k, Col.OUTSTANDING]
    return best


@kernel
def toward(candidates, mask, wanted, side):
    """Row that brings the fleet one instance nearer to ``wanted`` that prefill only, the others being ``side``."""
    have, row = float(count_prefill(candidates)), -1
    if wanted > have:
        row = flip(candidates, mask, -1, _PREFILL)
    elif wanted < have:
        row = flip(candidates, mask, _PREFILL, side)
    return row if row >= 0 else hold(candidates, mask)


@kernel
def follow(candidates, mask, memory):
    """One role change towards the target N_P; KEEP at the target, without one, or where the core allows none now."""
    n_p, target = count_prefill(candidates), int(memory[_TARGET])
    row = -1
    if target > n_p:
        row = flip(candidates, mask, _DECODE, _PREFILL)
    elif 0 < target < n_p:
        row = flip(candidates, mask, _PREFILL, _DECODE)
    return row if row >= 0 else hold(candidates, mask)


@kernel
def corrected(wanted, now, ttft, tpot, high, low, least, most):
    """What is wanted, one instance away from ``now`` at least where one target alone is at risk."""
    if ttft > high and tpot < low:
        return min(max(wanted, now + 1.0), most)
    if tpot > high and ttft < low:
        return max(min(wanted, now - 1.0), least)
    return wanted


@kernel
def composition(p, d, n, now, spare, hysteresis, least):
    """Prefill instances of a fleet of ``n`` for the needs (P, D), ``now`` being what is, at least ``least``."""
    if p + d <= 0.0:
        return now
    left = n - p - d
    wanted = p + spare * left if left >= 0.0 else n * p / (p + d)
    if wanted > now + 0.5 + hysteresis:
        now = np.ceil(wanted - 0.5)
    elif wanted < now - 0.5 - hysteresis:
        now = np.floor(wanted + 0.5)
    return min(max(now, least), n - 1.0)


@kernel
def risks(context, candidates, ttft_s, ttft_factor, tpot_s, both):
    """(r_P, r_D): how near each target is to being missed now; 1 is at the target.

    r_P = max(mean TTFT of the last window, least predicted wait) / TTFT_SLO, which is that of a mean prompt;
    r_D = max(mean TPOT of it, longest decode step now) / TPOT_SLO.

    :param both: whether instances of both phases count among those that a prompt may wait for
    """
    wait, step = np.inf, 0.0
    for k in range(candidates.shape[0]):
        if candidates[k, Col.INSTANCE] < 0.0:
            continue
        role = int(candidates[k, Col.ROLE])
        if role == _PREFILL or (both and role != _DECODE):
            wait = min(wait, candidates[k, Col.WAIT_S])
        if role != _PREFILL:
            step = max(step, candidates[k, Col.STEP_S])
    wait = 0.0 if wait == np.inf else wait
    target = max(ttft_s, ttft_factor * context[Ctx.ISOLATED_S], 1e-9)
    return max(context[Ctx.WIN_TTFT_S], wait) / target, max(context[Ctx.WIN_TPOT_S], step) / tpot_s
