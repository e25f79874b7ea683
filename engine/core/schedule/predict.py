"""What the scheduler itself predicts from the nominal profile: step times, and the SM split while both lanes run."""

from __future__ import annotations

import numpy as np

from engine.core.kinds import LaneKind, Split
from engine.core.state import NEVER as _NEVER
from engine.jit.kernel import kernel
from engine.latency.evaluate import decode_s, fused_shared_s, prefill_s

_K_PREFILL = int(LaneKind.PREFILL)
_AUTO, _TABLE, _ON_DEMAND = (int(x) for x in Split)


@kernel(forceinline=True)
def whole_device(s, i):
    """Share row of instance ``i`` that stands for all SMs."""
    return s.profile[s.inst[i].profile].n_shares - 1


@kernel(forceinline=True)
def running_ctx(s, i):
    """Σ context of the running set of instance ``i`` at this moment, steps not yet booked included."""
    return s.inst[i].run_ctx + s.inst[i].unbooked * s.inst[i].run_n


@kernel
def prefill_share(s, i, decode_row):
    """Share row left to prefill beside decode on ``decode_row``: the largest one that fits into the other SMs."""
    p = s.inst[i].profile
    rest = s.profile[p].total_sms - s.share[p, decode_row].sms
    row = 0
    for k in range(s.profile[p].n_shares):
        if s.share[p, k].sms <= rest:
            row = k
    return row


@kernel
def tightest_tpot_s(s, i):
    """Least TPOT target among the classes that decode on instance ``i``, seconds (the least of all when none does)."""
    least, any_class = 1e9, 1e9
    for c in range(s.cluster[0].n_classes):
        any_class = min(any_class, s.cls[c].tpot_s)
        if s.due[i, c] < _NEVER:
            least = min(least, s.cls[c].tpot_s)
    return least if least < 1e9 else any_class


@kernel
def split_for(s, i, sum_ctx, bs):
    """Decode's share row while prefill runs: fixed, in force, or the smallest whose worst case is under the target.

    MuxWise section 4: worst = T_decode(row) × guard ≤ headroom × TPOT target; the largest partial row if none does.
    """
    split = s.inst[i].split
    p = s.inst[i].profile
    last = s.profile[p].n_shares - 1
    if split >= 0:
        return min(split, last)
    if split != _AUTO:
        return min(s.inst[i].row, max(last - 1, 0))
    limit = s.inst[i].headroom * tightest_tpot_s(s, i)
    for row in range(last):
        if decode_s(s.profile[p], s.share[p, row], sum_ctx, bs) * s.share[p, row].guard <= limit:
            return row
    return max(last - 1, 0)


@kernel
def predict_step(s, i, l):
    """Predicted seconds of the step in lane (i, l), by the nominal profile."""
    lane = s.lane[i, l]
    p = s.inst[i].profile
    profile = s.profile[p]
    share = s.share[p, lane.share]
    prefill = prefill_s(profile, share, lane.sum_n2, lane.sum_nr, lane.sum_n)
    decode = decode_s(profile, share, lane.sum_ctx, lane.bs)
    if lane.kind == _K_PREFILL and lane.layer_to > 0:
        prefill *= (lane.layer_to - lane.layer_from) / profile.n_layers
    if lane.corun == 1:
        prefill *= share.corun_prefill
        decode *= share.corun_decode
    overhead = profile.step_overhead_s if lane.bs == 0 else 0.0
    return prefill + decode - fused_shared_s(share, prefill, decode) + overhead


@kernel
def table_row(s, i, bs):
    """Share row that the table of instance ``i`` gives a decode batch of ``bs`` (its first row below the least)."""
    row = s.inst[i].table_row[0]
    for k in range(s.inst[i].table_n):
        if s.inst[i].table_bs[k] <= bs:
            row = s.inst[i].table_row[k]
    return row


@kernel
def row_on_demand(s, i):
    """Decode's share row for the fused step in lane (i, 0), -1 where that step may run as it is (DuetServe).

    Fused unless its predicted time exceeds headroom × TPOT target. Else, of the rows whose worst case keeps that,
    the one of most tokens per second, with k decode steps beside one prefill chunk:

        (n_prefill + k · bs) / max(T_prefill, k · T_decode),   k = max(1, floor(T_prefill / T_decode))

    The largest partial row if none keeps it.
    """
    p = s.inst[i].profile
    last = s.profile[p].n_shares - 1
    limit = s.inst[i].headroom * tightest_tpot_s(s, i)
    if last < 1 or predict_step(s, i, 0) <= limit:
        return -1
    lane = s.lane[i, 0]
    best, rate = last - 1, -1.0
    for row in range(last):
        decode = decode_s(s.profile[p], s.share[p, row], lane.sum_ctx, lane.bs) * s.share[p, row].guard
        if decode > limit:
            continue
        part = s.share[p, prefill_share(s, i, row)]
        prefill = prefill_s(s.profile[p], part, lane.sum_n2, lane.sum_nr, lane.sum_n) * part.corun_prefill
        steps = max(np.floor(prefill / max(decode, 1e-9)), 1.0)
        tokens = (lane.sum_n + steps * lane.bs) / max(prefill, steps * decode, 1e-9)
        if tokens > rate:
            best, rate = row, tokens
    return best


@kernel
def expected_row(s, i):
    """Decode's share row that forecasts assume beside a prefill: the one in force, or the middle where it moves."""
    split = s.inst[i].split
    if split >= 0:
        return split
    if split == _TABLE:
        return s.inst[i].row
    return (s.profile[s.inst[i].profile].n_shares - 1) // 2
