"""What the scheduler itself predicts from the nominal profile: step times, and the SM split while both lanes run."""

from __future__ import annotations

from engine.core.jit import kernel
from engine.core.state import NEVER as _NEVER
from engine.core.state import LaneKind
from engine.latency.evaluate import decode_s, fused_shared_s, prefill_s

__all__ = ["predict_step", "prefill_share", "split_for", "tightest_tpot_s", "whole_device"]

_K_PREFILL = int(LaneKind.PREFILL)


@kernel(forceinline=True)
def whole_device(s, i):
    """Share row of instance ``i`` that stands for all SMs."""
    return s.profile[s.inst[i].profile].n_shares - 1


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
    """Decode's share row while prefill runs: fixed, or the smallest that keeps the worst case under the target.

    MuxWise section 4: worst = T_decode(row) × guard ≤ headroom × TPOT target; the largest partial row if none does.
    """
    split = s.inst[i].split
    p = s.inst[i].profile
    last = s.profile[p].n_shares - 1
    if split >= 0:
        return min(split, last)
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
