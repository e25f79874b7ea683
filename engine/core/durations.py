"""How long a planned step and a transfer take by a given profile: one answer for modelled instances and surrogate."""

from __future__ import annotations

import numpy as np

from engine.core.kinds import LaneKind
from engine.jit.kernel import kernel
from engine.latency.evaluate import decode_line, decode_s, fused_shared_s, prefill_s, times, to_ticks

_K_PREFILL, _K_DECODE = int(LaneKind.PREFILL), int(LaneKind.DECODE)


@kernel
def step_ticks(profile, share, lane):
    """Ticks of the step in ``lane``, and how many more each further decode step of the same batch takes."""
    if lane.kind == _K_DECODE:
        factor = share.corun_decode if lane.corun == 1 else 1.0
        per_ctx, base = decode_line(profile, share, lane.bs, factor)
        return max(times(per_ctx, lane.sum_ctx) + base, 1), per_ctx * lane.bs
    prefill = prefill_s(profile, share, lane.sum_n2, lane.sum_nr, lane.sum_n)
    if lane.kind == _K_PREFILL:
        if lane.layer_to > 0:
            prefill *= (lane.layer_to - lane.layer_from) / profile.n_layers
        if lane.corun == 1:
            prefill *= share.corun_prefill
        return max(to_ticks(prefill + profile.step_overhead_s), 1), np.int64(0)
    decode = decode_s(profile, share, lane.sum_ctx, lane.bs)
    return max(to_ticks(prefill + decode - fused_shared_s(share, prefill, decode)), 1), np.int64(0)


@kernel
def transfer_ticks(s, profile, link, r):
    """Ticks that the KV of request ``r`` takes over ``link``; ``profile`` is that of its receiver."""
    seconds = s.link[link].latency_s if s.link[link].latency_s >= 0.0 else profile.migrate_latency_s
    if s.link[link].bytes_per_s > 0.0:
        moved = s.req[r].computed - s.req[r].dst_cached
        seconds += moved * profile.kv_bytes_per_token / s.link[link].bytes_per_s
    return to_ticks(seconds)
