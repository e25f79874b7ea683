"""The numbers a policy reads: context and candidate rows (``engine.core.columns`` names and explains them).

Predictions use the nominal profile and what the scheduler knows; how long a request will really run enters
nowhere. Loads of a jump in progress (``unbooked`` decode steps) are accounted for, so a surrogate that jumps and
one that steps show a policy the same numbers. Of a state that a router is shown late (``lag``), what is said of
instances was so then.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Ctx, Kind, Need
from engine.core.decide.outlook import hand_over_s, min_slack_s, prefill_forecast, queue_outlook, transfer_s
from engine.core.kinds import LaneKind, Role
from engine.core.kv import find_prefix
from engine.core.lists import HELD, inbound_of, queue_of, ready_of
from engine.core.schedule.predict import expected_row, running_ctx, tightest_tpot_s, whole_device
from engine.jit.kernel import kernel
from engine.latency.evaluate import decode_s, prefill_s

_PREFILL, _DECODE, _MIXED, _MULTIPLEXED = (int(r) for r in Role)
_PLACE_PREFILL, _PLACE_DECODE = int(Kind.PLACE_PREFILL), int(Kind.PLACE_DECODE)
_IDLE = int(LaneKind.IDLE)
_PREDICT, _DIMENSIONLESS, _QUEUE_NEED = int(Need.PREDICT), int(Need.DIMENSIONLESS), int(Need.QUEUE)

#: Scale of the SLACK columns, in TPOT targets.
_SLACK_SCALE = 10.0
_CLIP = 50.0

# Column numbers as plain constants: enumeration members are not compile-time integers inside kernels.
(_IS_INSTANCE, _IS_HOLD, _IS_SHED, _IS_KEEP, _IN_PLACE, _ROLE0, _, _, _, _TTFT, _WAIT, _PREFILL_C, _SLACK,
 _SLACK_AFTER, _STEP, _STEP_WITH, _KV, _KV_WITH, _CACHED, _BATCH, _QUEUE, _INBOUND, _QUEUE_WORK, _DRAINING,
 _TO_PREFILL, _, _, _, _DECODE_SHARE, _SPLIT_DELTA, _CHUNK, _CHUNK_DELTA, _INSTANCE, _ROLE, _QUEUE_TOKENS,
 _QUEUE_N, _RUN_N, _RUN_CTX, _OUTSTANDING, _FREE_BLOCKS, _TOTAL_BLOCKS, _CACHED_TOKENS, _TTFT_S, _WAIT_S,
 _PREFILL_S, _STEP_S, _STEP_WITH_S, _MIN_SLACK_S, _INBOUND_N, _INBOUND_TOKENS, _TRANSFER_S, _NEW_ROLE, _BUSY,
 _OUT_N, _CHUNK_TOKENS, _SPLIT, _PREFILLING, _PROFILE, _READY_N, _AHEAD_S,
 _QUEUE_SLACK_S, _BECOMES) = (int(c) for c in Col)  # fmt: skip
_C = tuple(int(c) for c in Ctx)
(_SIZE, _AGE, _TPOT_TIGHTNESS, _LOAD_MEAN, _LOAD_MIN, _BATCH_MEAN, _KV_MEAN, _PREFILL_RHO, _DECODE_RHO,
 _PREFILL_SHARE, _DECODE_SHARE_C, _TTFT_OK, _TPOT_OK, _HELD, _PROMPT_RATIO, _EXPECTED_OUTPUT, _NOW_S, _KIND,
 _REQUEST, _PROMPT, _ARRIVAL_S, _TTFT_SLO_S, _TPOT_SLO_S, _CLASS, _GENERATED, _SOURCE, _ISOLATED_S,
 _MEAN_PROMPT, _MEAN_OUTPUT, _HELD_N, _WIN_SPAN_S, _WIN_RATE, _WIN_PROMPT, _WIN_OUTPUT, _WIN_TTFT_S,
 _WIN_TPOT_S, _N_INSTANCES, _TTFT_FACTOR) = _C[4:]  # fmt: skip


@kernel(forceinline=True)
def _clip(x):
    return min(max(x, -_CLIP), _CLIP)


@kernel
def _load_columns(s, i, row):
    inst = s.inst[i]
    pool = s.pool[inst.pool]
    context = running_ctx(s, i)
    queued = s.lists[queue_of(i), 2]
    inbound = s.lists[inbound_of(i), 2] + inst.moving_n
    row[_INSTANCE] = i
    row[_ROLE] = inst.role
    row[_QUEUE_TOKENS] = inst.queue_tokens
    row[_QUEUE_N] = queued
    row[_RUN_N] = inst.run_n + s.lists[ready_of(i), 2]
    row[_READY_N] = s.lists[ready_of(i), 2]
    row[_RUN_CTX] = context
    row[_OUTSTANDING] = inst.queue_tokens + context + inst.inbound_tokens
    row[_TOTAL_BLOCKS] = pool.n_blocks
    row[_FREE_BLOCKS] = pool.n_blocks - (context + inst.held_tokens) // s.cluster[0].block_tokens
    row[_INBOUND_N] = inbound
    row[_INBOUND_TOKENS] = inst.inbound_tokens
    row[_NEW_ROLE] = -1.0
    busy = s.lane[i, 0].kind != _IDLE or s.lane[i, 1].kind != _IDLE
    row[_BUSY] = 1.0 if busy else 0.0
    row[_OUT_N] = inst.out_n
    row[_CHUNK_TOKENS] = inst.chunk_tokens
    row[_SPLIT] = inst.split
    row[_PREFILLING] = 1.0 if inst.started_n > 0 else 0.0
    row[_PROFILE] = inst.profile
    row[_BECOMES] = 1.0 + inst.target_role


@kernel
def _predict_columns(s, i, r, kind, now, row):
    inst = s.inst[i]
    then = now - s.cluster[0].lag
    p = inst.profile
    profile, full = s.profile[p], s.share[p, whole_device(s, i)]
    context = running_ctx(s, i)
    seats = inst.run_n + s.lists[ready_of(i), 2] + s.lists[inbound_of(i), 2] + inst.moving_n
    row[_STEP_S] = decode_s(profile, full, context, inst.run_n)
    row[_MIN_SLACK_S] = min_slack_s(s, i, then)
    row[_CACHED_TOKENS] = 0.0
    row[_TRANSFER_S] = 0.0
    row[_WAIT_S] = 0.0
    row[_PREFILL_S] = 0.0
    row[_TTFT_S] = 0.0
    row[_STEP_WITH_S] = row[_STEP_S]
    if r < 0:
        wait, _, _ = prefill_forecast(s, i, 0.0, 0.0, then)
        row[_WAIT_S] = wait
        return 0.0
    req = s.req[r]
    tokens = float(req.target)
    expected = context + inst.inbound_tokens + inst.held_tokens + tokens
    row[_STEP_WITH_S] = decode_s(profile, full, np.int64(expected), seats + 1)
    stall = 0.0
    if kind == _PLACE_PREFILL:
        _, n_prefix = find_prefix(s, inst.pool, r)
        reused = float(n_prefix * s.cluster[0].block_tokens)
        wait, own, stall = prefill_forecast(s, i, tokens - reused, reused, then)
        row[_CACHED_TOKENS] = reused
        row[_WAIT_S] = wait
        row[_PREFILL_S] = own
        row[_TTFT_S] = (now - req.arrival) * 1e-12 + wait + own
        row[_TRANSFER_S] = hand_over_s(s, i, tokens)
    elif s.inst[req.inst].pool != inst.pool:
        _, n_prefix = find_prefix(s, inst.pool, r)
        row[_CACHED_TOKENS] = n_prefix * s.cluster[0].block_tokens
        row[_TRANSFER_S] = transfer_s(s, i, req.computed - row[_CACHED_TOKENS])
    else:
        row[_CACHED_TOKENS] = req.computed
    return stall


@kernel
def _class_ttft_s(s):
    """TTFT target of the first class for a prompt of mean length, seconds: what control decisions know."""
    seconds = s.cls[0].ttft_s
    if s.cls[0].ttft_factor > 0.0:
        mean = max(s.cluster[0].mean_prompt, 1.0)
        p = s.inst[0].profile
        alone = prefill_s(s.profile[p], s.share[p, whole_device(s, 0)], mean * mean, 0.0, mean)
        seconds = max(seconds, s.cls[0].ttft_factor * (alone + s.profile[p].step_overhead_s))
    return max(seconds, 1e-3)


@kernel
def _dimensionless_columns(s, i, r, kind, stall, row):
    inst = s.inst[i]
    ttft = s.req[r].ttft_slo * 1e-12 if r >= 0 else _class_ttft_s(s)
    tpot = s.req[r].tpot_slo * 1e-12 if r >= 0 else s.cls[0].tpot_s
    tight = min(tightest_tpot_s(s, i), tpot) if inst.run_n > 0 else tpot
    for k in range(_INSTANCE):
        row[k] = 0.0
    row[_IS_INSTANCE] = 1.0
    row[_ROLE0 + inst.role] = 1.0
    row[_TTFT] = _clip(row[_TTFT_S] / ttft)
    row[_WAIT] = _clip(row[_WAIT_S] / ttft)
    row[_PREFILL_C] = _clip(row[_PREFILL_S] / ttft)
    scale = _SLACK_SCALE * tight
    row[_SLACK] = min(max(row[_MIN_SLACK_S] / scale, -2.0), 2.0)
    row[_SLACK_AFTER] = min(max((row[_MIN_SLACK_S] - stall) / scale, -2.0), 2.0)
    row[_STEP] = _clip(row[_STEP_S] / tight)
    row[_STEP_WITH] = _clip(row[_STEP_WITH_S] / tpot)
    pool_tokens = float(s.pool[inst.pool].n_blocks * s.cluster[0].block_tokens)
    used = row[_RUN_CTX] + inst.held_tokens
    cached = row[_CACHED_TOKENS] if kind == _PLACE_PREFILL else 0.0
    own = float(s.req[r].target) - cached if r >= 0 else 0.0
    row[_KV] = min(used / pool_tokens, 1.0)
    row[_KV_WITH] = min((used + inst.queue_tokens + inst.inbound_tokens + own) / pool_tokens, 2.0)
    if r >= 0:
        row[_CACHED] = cached / s.req[r].target
    row[_BATCH] = (row[_RUN_N] + row[_INBOUND_N]) / inst.max_batch
    row[_QUEUE] = np.log1p(row[_QUEUE_N])
    if kind == _PLACE_DECODE:
        row[_INBOUND] = _clip(row[_TRANSFER_S] / scale)
    row[_QUEUE_WORK] = _clip(inst.queue_work * 1e-12 / ttft)
    row[_DRAINING] = 1.0 if inst.target_role >= 0 else 0.0
    row[_DECODE_SHARE] = s.share[inst.profile, expected_row(s, i)].sms / s.profile[inst.profile].total_sms
    row[_CHUNK] = inst.chunk_tokens / 2048.0
    if kind == _PLACE_DECODE:
        row[_IN_PLACE] = 1.0 if s.inst[s.req[r].inst].pool == inst.pool else 0.0


@kernel
def candidate_row(s, i, r, kind, now, needs, row):
    """Fill the row of instance ``i`` for a decision about request ``r`` (-1 for control decisions)."""
    _load_columns(s, i, row)
    if needs & (_PREDICT | _DIMENSIONLESS | _QUEUE_NEED) == 0:
        return
    stall = _predict_columns(s, i, r, kind, now, row)
    if needs & _QUEUE_NEED != 0:
        ahead, slack = queue_outlook(s, i, r, row[_PREFILL_S], kind == _PLACE_PREFILL, now - s.cluster[0].lag)
        row[_AHEAD_S] = ahead
        row[_QUEUE_SLACK_S] = slack
    if needs & _DIMENSIONLESS != 0:
        _dimensionless_columns(s, i, r, kind, stall, row)


@kernel
def _request_context(s, kind, r, now, out):
    """Columns about the request in question; neutral values for control decisions."""
    p = s.inst[0].profile
    profile, full = s.profile[p], s.share[p, whole_device(s, 0)]
    out[_REQUEST] = r if kind <= _PLACE_DECODE else -1
    out[_SOURCE] = -1.0 if kind != 3 else r
    if kind > _PLACE_DECODE:
        mean = max(s.cluster[0].mean_prompt, 1.0)
        out[_PROMPT] = 0.0
        out[_ARRIVAL_S] = now * 1e-12 + s.cluster[0].origin_s
        out[_TTFT_SLO_S] = _class_ttft_s(s)
        out[_TTFT_FACTOR] = s.cls[0].ttft_factor
        out[_TPOT_SLO_S] = s.cls[0].tpot_s
        out[_CLASS] = 0.0
        out[_GENERATED] = 0.0
        out[_ISOLATED_S] = prefill_s(profile, full, mean * mean, 0.0, mean)
        return
    req = s.req[r]
    n = float(req.target)
    out[_PROMPT] = req.prompt
    out[_ARRIVAL_S] = req.arrival * 1e-12 + s.cluster[0].origin_s
    out[_TTFT_SLO_S] = req.ttft_slo * 1e-12
    out[_TTFT_FACTOR] = s.cls[req.cls].ttft_factor
    out[_TPOT_SLO_S] = req.tpot_slo * 1e-12
    out[_CLASS] = req.cls
    out[_GENERATED] = req.generated
    out[_ISOLATED_S] = prefill_s(profile, full, n * n, 0.0, n) + profile.step_overhead_s
    if kind == _PLACE_DECODE:
        out[_SOURCE] = req.inst


@kernel
def _cluster_context(s, out):
    """Dimensionless columns about the cluster as a whole."""
    n = s.cluster[0].n_instances
    ttft, tpot = out[_TTFT_SLO_S], out[_TPOT_SLO_S]
    prefill_n, decode_n, load, least, batch, kv, step = 0, 0, 0.0, _CLIP, 0.0, 0.0, 0.0
    for i in range(n):
        inst = s.inst[i]
        capacity = s.pool[inst.pool].n_blocks * s.cluster[0].block_tokens
        kv += min((running_ctx(s, i) + inst.held_tokens) / capacity, 1.0)
        if inst.role != _DECODE:
            prefill_n += 1
            work = _clip(inst.queue_work * 1e-12 / ttft)
            load += work
            least = min(least, work)
        if inst.role != _PREFILL:
            decode_n += 1
            batch += (inst.run_n + s.lists[ready_of(i), 2]) / inst.max_batch
            p = inst.profile
            step += decode_s(s.profile[p], s.share[p, whole_device(s, i)], running_ctx(s, i), inst.run_n)
    p = s.inst[0].profile
    full = s.share[p, whole_device(s, 0)]
    one = decode_s(s.profile[p], full, np.int64(out[_MEAN_PROMPT]), 1)
    gap_s = max(s.cluster[0].ema_gap * 1e-12, 1e-6)
    mean = max(s.cluster[0].mean_prompt, 1.0)
    alone = prefill_s(s.profile[p], full, mean * mean, 0.0, mean)
    step = max(step / max(decode_n, 1), one)
    out[_SIZE] = _clip(out[_ISOLATED_S] / ttft)
    out[_AGE] = _clip((out[_NOW_S] - out[_ARRIVAL_S]) / ttft)
    out[_TPOT_TIGHTNESS] = _clip(one / tpot)
    out[_LOAD_MEAN] = load / max(prefill_n, 1)
    out[_LOAD_MIN] = least if prefill_n > 0 else 0.0
    out[_BATCH_MEAN] = batch / max(decode_n, 1)
    out[_KV_MEAN] = kv / n
    out[_PREFILL_RHO] = _clip(alone / (gap_s * max(prefill_n, 1)))
    seats = float(max(decode_n, 1) * s.inst[0].max_batch)
    out[_DECODE_RHO] = _clip(s.cluster[0].mean_output * step / (gap_s * seats))
    out[_PREFILL_SHARE] = prefill_n / n
    out[_DECODE_SHARE_C] = decode_n / n
    out[_TTFT_OK] = s.cluster[0].ema_ttft_ok
    out[_TPOT_OK] = s.cluster[0].ema_tpot_ok
    out[_HELD] = _clip(s.lists[HELD, 2] / n)
    out[_PROMPT_RATIO] = _clip(out[_PROMPT] / mean)
    out[_EXPECTED_OUTPUT] = _clip(s.cluster[0].mean_output * step / ttft)


@kernel
def context_row(s, kind, subject, now, needs, out):
    """Fill the context of a decision about ``subject`` (a request, or for TUNE an instance)."""
    c = s.cluster[0]
    out[_NOW_S] = now * 1e-12 + c.origin_s
    out[_KIND] = kind
    out[_N_INSTANCES] = c.n_instances
    if kind <= _PLACE_DECODE:
        out[_REQUEST] = subject
        out[_PROMPT] = s.req[subject].prompt
        out[_SOURCE] = s.req[subject].inst if kind == _PLACE_DECODE else -1
    if needs & (_PREDICT | _DIMENSIONLESS | _QUEUE_NEED) == 0:
        return
    _request_context(s, kind, subject, now, out)
    out[_MEAN_PROMPT] = c.mean_prompt
    out[_MEAN_OUTPUT] = c.mean_output
    out[_HELD_N] = s.lists[HELD, 2]
    out[_WIN_SPAN_S] = c.last_span_s
    out[_WIN_RATE] = c.last_rate
    out[_WIN_PROMPT] = c.last_prompt
    out[_WIN_OUTPUT] = c.last_output
    out[_WIN_TTFT_S] = c.last_ttft_s
    out[_WIN_TPOT_S] = c.last_tpot_s
    if needs & _DIMENSIONLESS != 0:
        for k in range(4):
            out[k] = 1.0 if k == kind else 0.0
        _cluster_context(s, out)
