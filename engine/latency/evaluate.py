"""The latency model as packed tables and kernels: what the core predicts with and the surrogate runs on.

One ``PROFILE`` row per (model, device, TP); one ``SHARE`` row per SM share of that profile, ascending in
``sms`` (the last row is the whole device). Forms (DESIGN.md section 4; DistServe appendix A; MuxWise section 4):

* prefill [s] = a·Σn² + b·Σn·r + c·Σn + d   (n new tokens, r tokens already in the cache, per prompt),
  with ``c·Σn + d`` replaced by a piecewise-linear curve where knots are given, never below ``floor``
* decode [s]  = a·Σctx + b·bs + c           (a second set of coefficients from ``regime_bs`` sequences on)
* fused step  = prefill + decode − shared   (weights are read once)

Decode times are evaluated on an integer grid of 1 ps. A run of k decode steps is then an exact integer
polynomial in k, so jumping over k steps and taking them one by one give the same time to the last bit.
"""

from __future__ import annotations

import numpy as np

from engine.jit.kernel import kernel

#: Time inside the core is an int64 count of picoseconds: 106 days of range.
TICKS_PER_S = 1_000_000_000_000
#: The longest duration, 26 days: longer ones count as that, so that sums of a stamp and a duration never overflow.
FOREVER = 2**61
_FOREVER, _ALWAYS = float(FOREVER), 2.0 * FOREVER
_SHORT, _FEW = 2**42, 2**20  # of these even the product is below _ALWAYS: 4.4 s, a million tokens
MAX_KNOTS = 8

PROFILE = np.dtype(
    [
        ("n_layers", np.int32),
        ("n_shares", np.int32),
        ("total_sms", np.int32),
        ("regime_bs", np.int32),  # decode batches of at least this size use the large-batch coefficients
        ("kv_tokens", np.int64),  # KV capacity of one instance, tokens
        ("kv_bytes_per_token", np.float64),
        ("step_overhead_s", np.float64),  # host time added to every step
        ("ctx_overhead_s", np.float64),  # host time per context token and decode step
        ("migrate_latency_s", np.float64),  # fixed part of one KV transfer
        ("switch_s", np.float64),  # pause of a role change, after its drain
        ("switch_full", np.int32),  # 1: a role change drains everything and loses the prefix cache
        ("prefill_min_tokens", np.int32),  # Σn is floored here (kernels do not get faster below)
    ],
    align=True,
)

SHARE = np.dtype(
    [
        ("sms", np.int32),
        ("n_knots", np.int32),
        ("prefill", np.float64, (4,)),  # a, b, c, d in seconds per token², token², token, 1
        ("knot_tokens", np.float64, (MAX_KNOTS,)),
        ("knot_s", np.float64, (MAX_KNOTS,)),
        ("floor_s_per_token", np.float64),  # roofline: no prefill is faster than this per token
        ("decode_small", np.float64, (3,)),  # a, b, c in seconds per context token, sequence, 1
        ("decode_large", np.float64, (3,)),
        ("fused_shared_s", np.float64),  # saved when prefill and decode share one step
        ("corun_prefill", np.float64),  # slow-down of prefill while decode runs on the other SMs
        ("corun_decode", np.float64),  # slow-down of decode while prefill runs on the other SMs
        ("guard", np.float64),  # worst-case slow-down a predictor should assume for decode
    ],
    align=True,
)


@kernel
def to_ticks(seconds):
    """Seconds to ticks, rounded to the nearest; at most FOREVER, which is what a number that is none becomes, too."""
    ticks = np.rint(seconds * 1e12)
    ticks = ticks if ticks < _FOREVER else _FOREVER
    return np.int64(ticks if ticks > -_FOREVER else -_FOREVER)


@kernel
def times(ticks, n):
    """``ticks`` × ``n``, at most twice FOREVER."""
    if (ticks >= _SHORT or n >= _FEW) and float(ticks) * float(n) >= _ALWAYS:
        return np.int64(_ALWAYS)
    return np.int64(ticks * n)


@kernel
def prefill_s(profile, share, sum_n2, sum_nr, sum_n):
    """Seconds to prefill a batch with Σn², Σn·r and Σn as given (0 for an empty batch)."""
    if sum_n <= 0:
        return 0.0
    tokens = max(float(sum_n), float(profile.prefill_min_tokens))
    knots = share.n_knots
    if knots >= 2:
        i = 1
        while i < knots - 1 and share.knot_tokens[i] < tokens:
            i += 1
        x0, y0 = share.knot_tokens[i - 1], share.knot_s[i - 1]
        linear = y0 + (tokens - x0) * (share.knot_s[i] - y0) / (share.knot_tokens[i] - x0)
    else:
        linear = share.prefill[2] * tokens + share.prefill[3]
    seconds = share.prefill[0] * sum_n2 + share.prefill[1] * sum_nr + linear
    return max(seconds, share.floor_s_per_token * sum_n)


@kernel
def decode_line(profile, share, bs, factor):
    """A decode step of ``bs`` sequences as a line in the context: (ticks per context token, ticks at zero context).

    ``factor`` scales the device part (co-run slow-down, jitter); host overhead is not scaled.
    """
    c = share.decode_large if bs >= profile.regime_bs else share.decode_small
    per_ctx = to_ticks(c[0] * factor + profile.ctx_overhead_s)
    base = to_ticks((c[1] * bs + c[2]) * factor + profile.step_overhead_s)
    return per_ctx, base


@kernel
def decode_s(profile, share, sum_ctx, bs):
    """Seconds of one decode step of ``bs`` sequences holding ``sum_ctx`` context tokens (0 when ``bs`` is 0)."""
    if bs <= 0:
        return 0.0
    per_ctx, base = decode_line(profile, share, bs, 1.0)
    return (times(per_ctx, sum_ctx) + base) * 1e-12


@kernel
def fused_shared_s(share, prefill, decode):
    """Seconds that a fused step saves against its two parts run one after the other."""
    if prefill <= 0.0 or decode <= 0.0:
        return 0.0
    return min(share.fused_shared_s, min(prefill, decode))
