"""Decision epochs: what is asked next, with which candidates, and what an answer does.

``next_decision`` names the question, ``build`` fills the context, candidates and mask (columns of
``engine.core.columns``), and ``apply`` carries out the chosen index. The order is fixed: hand-overs, placements,
then the control decisions.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import N_CANDIDATE as _N_CANDIDATE
from engine.core.columns import Col, Kind
from engine.core.decide.features import candidate_row, context_row
from engine.core.decide.patience import fits, is_idle, may_hold, may_shed, note_hold
from engine.core.events.handover import drop_handover, hand_over
from engine.core.events.lifecycle import hold, place, shed
from engine.core.events.roles import begin_role_change, count_able, may_change
from engine.core.kinds import Batching, RequestState, Role
from engine.core.kv import could_hold
from engine.core.lists import HANDOVER, PLACING, remove
from engine.core.slo import end_request
from engine.jit.kernel import kernel

_PREFILL, _DECODE, _MIXED, _MULTIPLEXED = (int(r) for r in Role)
_PLACE_PREFILL, _PLACE_DECODE, _REALLOCATE, _TUNE = (int(k) for k in Kind)
_FAILED = int(RequestState.FAILED)
_LAYERED = int(Batching.LAYERED)
_CHUNK_LOW, _CHUNK_HIGH = 64, 8192

_IS_HOLD, _IS_SHED, _IS_KEEP = int(Col.IS_HOLD), int(Col.IS_SHED), int(Col.IS_KEEP)
_TO_PREFILL, _INSTANCE, _NEW_ROLE = int(Col.TO_PREFILL), int(Col.INSTANCE), int(Col.NEW_ROLE)
_SPLIT_DELTA, _CHUNK_DELTA = int(Col.SPLIT_DELTA), int(Col.CHUNK_DELTA)


@kernel
def open_control(s):
    """A control interval ended: put the REALLOCATE and TUNE questions that the scenario allows."""
    if s.cluster[0].ask_realloc == 1:
        s.cluster[0].realloc_due = 1
    if s.cluster[0].ask_tune == 1:
        s.cluster[0].tune_next = 0


@kernel
def _could_decode(s, i, r):
    """Whether instance ``i`` can decode request ``r``, be it on its way out of its role."""
    leaving = s.inst[i].switching == 1 and s.inst[i].target_role == _PREFILL
    if s.inst[i].role == _PREFILL or leaving or s.inst[i].lost == 1:
        return False
    return could_hold(s, i, s.req[r].computed + 1)


@kernel
def next_decision(s, now):
    """The question to answer now: (kind, subject), kind -1 when there is none.

    A request that fits nowhere, ever, ends as FAILED here instead of being asked about.
    """
    r = s.lists[HANDOVER, 0]
    while r >= 0:
        for i in range(s.cluster[0].n_instances):
            if _could_decode(s, i, r):
                return _PLACE_DECODE, r
        drop_handover(s, r, now)
        r = s.lists[HANDOVER, 0]
    r = s.lists[PLACING, 0]
    while r >= 0:
        for i in range(s.cluster[0].n_instances):
            if s.inst[i].lost != 1 and could_hold(s, i, s.req[r].target + 1):
                return _PLACE_PREFILL, r
        remove(s.lists, s.req, PLACING, r)
        end_request(s, r, now, _FAILED)
        r = s.lists[PLACING, 0]
    if s.cluster[0].realloc_due == 1:
        return _REALLOCATE, np.int32(-1)
    if s.cluster[0].tune_next >= 0:
        return _TUNE, s.cluster[0].tune_next
    return -1, np.int32(-1)


@kernel
def _clear(row):
    for k in range(_N_CANDIDATE):
        row[k] = 0.0


@kernel
def _empty_row(row, column):
    """A candidate without an instance: HOLD, SHED or KEEP."""
    _clear(row)
    row[column] = 1.0
    row[_INSTANCE] = -1.0
    row[_NEW_ROLE] = -1.0


@kernel
def _build_place_prefill(s, r, now, needs, candidates, mask):
    n = s.cluster[0].n_instances
    allowed = 0
    levers = s.cluster[0].allow_hold + s.cluster[0].allow_shed
    idle = False
    for i in range(n):
        candidate_row(s, i, r, _PLACE_PREFILL, now, needs, candidates[i])
        mask[i] = 1 if fits(s, i, r) else 0
        allowed += mask[i]
        idle = idle or (levers > 0 and mask[i] == 1 and is_idle(s, i))
    choice = levers > 0 and allowed > 0 and not idle
    _empty_row(candidates[n], _IS_HOLD)
    mask[n] = 1 if allowed == 0 or (choice and may_hold(s, r, now)) else 0
    _empty_row(candidates[n + 1], _IS_SHED)
    mask[n + 1] = 1 if choice and may_shed(s, r, now) else 0
    return n + 2


@kernel
def _build_place_decode(s, r, now, needs, candidates, mask):
    """Same rows as PLACE_PREFILL; staying in place is the row of the instance that prefilled the request."""
    n = s.cluster[0].n_instances
    allowed = 0
    for i in range(n):
        candidate_row(s, i, r, _PLACE_DECODE, now, needs, candidates[i])
        mask[i] = 1 if s.inst[i].target_role < 0 and s.inst[i].lost == 0 and _could_decode(s, i, r) else 0
        allowed += mask[i]
    for k in range(n, n + 2):
        _empty_row(candidates[k], _IS_HOLD)
        mask[k] = 0
    if allowed == 0:
        # Everyone else is draining: whoever can decode at all must take it.
        for i in range(n):
            mask[i] = 1 if _could_decode(s, i, r) else 0
    return n + 2


@kernel
def _build_reallocate(s, now, needs, candidates, mask):
    n = s.cluster[0].n_instances
    _empty_row(candidates[0], _IS_KEEP)
    mask[0] = 1
    k = 1
    for i in range(n):
        prefill, decode = count_able(s, i)
        for new in range(4):
            if new == s.inst[i].role:
                continue
            candidate_row(s, i, -1, _REALLOCATE, now, needs, candidates[k])
            candidates[k, _TO_PREFILL + new] = 1.0
            candidates[k, _NEW_ROLE] = new
            mask[k] = 1 if may_change(s, i, new, prefill, decode) else 0
            k += 1
    return k


@kernel
def _build_tune(s, i, now, needs, candidates, mask):
    """Rows: KEEP, less decode SMs, more decode SMs, half the chunk budget, twice the chunk budget."""
    _empty_row(candidates[0], _IS_KEEP)
    mask[0] = 1
    for k in range(1, 5):
        candidate_row(s, i, -1, _TUNE, now, needs, candidates[k])
    candidates[1, _SPLIT_DELTA] = -1.0
    candidates[2, _SPLIT_DELTA] = 1.0
    candidates[3, _CHUNK_DELTA] = -1.0
    candidates[4, _CHUNK_DELTA] = 1.0
    role = s.inst[i].role
    last = s.profile[s.inst[i].profile].n_shares - 1
    split = s.inst[i].split
    splits = role == _MULTIPLEXED and last > 0
    chunks = role == _MIXED or (role == _MULTIPLEXED and s.inst[i].batching != _LAYERED)
    mask[1] = 1 if splits and split != 0 else 0
    mask[2] = 1 if splits and split < last - 1 else 0
    mask[3] = 1 if chunks and s.inst[i].chunk_tokens >= 2 * _CHUNK_LOW else 0
    mask[4] = 1 if chunks and s.inst[i].chunk_tokens * 2 <= _CHUNK_HIGH else 0
    return 5


@kernel
def build(s, kind, subject, now, needs, context, candidates, mask):
    """Describe decision (kind, subject) at ``now``.

    :param needs: bit mask of ``Need``; columns not asked for may hold anything
    :param context: out, float64 (N_CONTEXT,)
    :param candidates: out, float64 (K max, N_CANDIDATE)
    :param mask: out, uint8 (K max,)
    :return: number of candidates
    """
    context_row(s, kind, subject, now, needs, context)
    if kind == _PLACE_PREFILL:
        return _build_place_prefill(s, subject, now, needs, candidates, mask)
    if kind == _PLACE_DECODE:
        return _build_place_decode(s, subject, now, needs, candidates, mask)
    if kind == _REALLOCATE:
        return _build_reallocate(s, now, needs, candidates, mask)
    return _build_tune(s, subject, now, needs, candidates, mask)


@kernel
def _apply_tune(s, i, action):
    last = s.profile[s.inst[i].profile].n_shares - 1
    split = s.inst[i].split
    if action == 1:
        s.inst[i].split = max(split - 1, 0) if split >= 0 else last // 2
    elif action == 2:
        s.inst[i].split = min(split + 1, last - 1) if split >= 0 else last // 2
    elif action == 3:
        s.inst[i].chunk_tokens = max(s.inst[i].chunk_tokens // 2, _CHUNK_LOW)
    elif action == 4:
        s.inst[i].chunk_tokens = min(s.inst[i].chunk_tokens * 2, _CHUNK_HIGH)
    if action > 0:
        s.inst[i].dirty = 1


@kernel
def apply(s, kind, subject, action, now):
    """Carry out answer ``action`` (an index into the candidates that ``build`` gave, and not masked)."""
    n = s.cluster[0].n_instances
    if kind == _PLACE_PREFILL:
        if action < n:
            place(s, subject, action, now)
        elif action == n:
            hold(s, subject)
            note_hold(s, subject, now)
        else:
            shed(s, subject, now)
    elif kind == _PLACE_DECODE:
        hand_over(s, subject, action, now)
    elif kind == _REALLOCATE:
        s.cluster[0].realloc_due = 0
        if action > 0:
            i = (action - 1) // 3
            new = (action - 1) % 3
            new += 1 if new >= s.inst[i].role else 0
            begin_role_change(s, i, new)
    else:
        _apply_tune(s, subject, action)
        s.cluster[0].tune_next += 1
        if s.cluster[0].tune_next >= n:
            s.cluster[0].tune_next = -1
