"""When a request may be held back or refused: no longer, no later and no sooner than that can help.

HOLD waits for something better, so there is none while an instance that prefills is idle, nor once a prefill that
started at once would miss the TTFT target. SHED tells a caller early that the target is out of reach: only while the
target has not passed, only where the prediction says so for every instance that may take the prompt, and never while
one that prefills is idle.
"""

from __future__ import annotations

import numpy as np

from engine.core.decide.outlook import prefill_forecast, residual_s, work_ahead_s
from engine.core.events.lifecycle import wake_held
from engine.core.kinds import LaneKind, RequestState, Role
from engine.core.kv import could_hold, find_prefix
from engine.core.lists import HELD, PLACING, inbound_of, push_back, queue_of, ready_of, remove
from engine.core.schedule.on_time import pace_of
from engine.core.schedule.predict import whole_device
from engine.core.state import NEVER as _NEVER
from engine.jit.kernel import kernel
from engine.latency.evaluate import prefill_s, to_ticks

_DECODE = int(Role.DECODE)
_IDLE = int(LaneKind.IDLE)
_PLACING = int(RequestState.PLACING)


@kernel
def fits(s, i, r):
    """Whether instance ``i`` may be given request ``r`` for prefill at all."""
    if s.inst[i].target_role >= 0 or s.inst[i].lost != 0:
        return False
    return could_hold(s, i, s.req[r].target + 1)


@kernel
def is_idle(s, i):
    """Whether instance ``i`` prefills by its role and has nothing to do."""
    inst = s.inst[i]
    if inst.role == _DECODE or inst.target_role >= 0 or inst.lost != 0:
        return False
    if s.lane[i, 0].kind != _IDLE or s.lane[i, 1].kind != _IDLE or inst.run_n > 0:
        return False
    waiting = s.lists[queue_of(i), 2] + s.lists[ready_of(i), 2] + s.lists[inbound_of(i), 2]
    return waiting + inst.moving_n == 0


@kernel
def _least_prefill_s(s, r):
    """Predicted prefill of request ``r`` alone, with the profile that is fastest at it."""
    least, last = np.inf, -1
    n = float(s.req[r].target)
    for i in range(s.cluster[0].n_instances):
        p = s.inst[i].profile
        if p != last:
            own = prefill_s(s.profile[p], s.share[p, whole_device(s, i)], n * n, 0.0, n)
            least, last = min(least, own + s.profile[p].step_overhead_s), p
    return least


@kernel
def _hold_until(s, r):
    """When request ``r`` may not be held any more, ticks: its TTFT target less its prefill, or the limit of all."""
    longest = min(s.req[r].ttft_slo - to_ticks(_least_prefill_s(s, r)), s.cluster[0].hold_limit)
    return s.req[r].arrival + longest


@kernel
def may_hold(s, r, now):
    """Whether request ``r`` may be held at ``now``, as far as time goes."""
    return s.cluster[0].allow_hold == 1 and now < _hold_until(s, r)


@kernel
def _in_reach(s, i, r, now):
    """Whether request ``r`` is predicted to meet its TTFT target on instance ``i``."""
    left = (s.req[r].arrival + s.req[r].ttft_slo - now) * 1e-12
    then = now - s.cluster[0].lag
    _, n_prefix = find_prefix(s, s.inst[i].pool, r)
    reused = float(n_prefix * s.cluster[0].block_tokens)
    wait, own, _ = prefill_forecast(s, i, s.req[r].target - reused, reused, then)
    if wait + own <= left:
        return True
    ahead = work_ahead_s(s, i, r, own, then)
    begun = min(residual_s(s, i, then), ahead)
    return begun + (ahead - begun) * pace_of(s, i) + own <= left


@kernel
def may_shed(s, r, now):
    """Whether request ``r`` may be refused at ``now``: early, and because nobody can meet its TTFT target."""
    if s.cluster[0].allow_shed == 0 or s.req[r].generated > 0 or now > s.req[r].arrival + s.req[r].ttft_slo:
        return False
    for i in range(s.cluster[0].n_instances):
        if not fits(s, i, r):
            continue
        if _in_reach(s, i, r, now):
            return False
    return True


@kernel
def note_hold(s, r, now):
    """Request ``r`` has just been held: it is asked for again in time."""
    until = _hold_until(s, r)
    due = s.cluster[0].hold_due if s.lists[HELD, 2] > 1 else np.int64(_NEVER)
    s.cluster[0].hold_due = min(due, until) if until > now else due


@kernel
def hold_event(s, now, when):
    """When held requests are asked for again, given that this was to be at ``when`` (``NEVER`` or more: not at all)."""
    return max(min(when, now + s.cluster[0].hold_ticks, s.cluster[0].hold_due), now)


@kernel
def _ask_again(s, r):
    remove(s.lists, s.req, HELD, r)
    s.req[r].state = _PLACING
    push_back(s.lists, s.req, PLACING, r)


@kernel
def wake_due(s, now):
    """Ask again for held requests: as many as ``hold_scan`` says, and whoever may not be held any more."""
    wake_held(s, s.cluster[0].hold_scan)
    due = np.int64(_NEVER)
    r = s.lists[HELD, 0]
    while r >= 0:
        after = s.req[r].next
        until = _hold_until(s, r)
        if until <= now:
            _ask_again(s, r)
        else:
            due = min(due, until)
        r = after
    s.cluster[0].hold_due = due


@kernel
def wake_for_idle(s):
    """Ask again for the first held request that an idle instance could prefill; returns whether there was one."""
    for i in range(s.cluster[0].n_instances):
        if is_idle(s, i):
            r = s.lists[HELD, 0]
            while r >= 0:
                if fits(s, i, r):
                    _ask_again(s, r)
                    return True
                r = s.req[r].next
    return False
