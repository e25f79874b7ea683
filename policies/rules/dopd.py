"""DOPD, planner repaired: as many prefill instances as keep the decode instances full, decided ahead of the
load.

Each interval T, from means over T and one-step forecasts isl′, osl′, rate′ (ctx = isl′ + osl′/2):

    d_corr = itl / ITL_prof(rate · duration / N_D, isl + osl/2),      duration = ttft + osl · itl
    B    = min(KV_tokens / ctx,  max b: ITL_prof(b, ctx) · d_corr ≤ TPOT_SLO)
    tpot′ = ITL_prof(B, ctx) · d_corr,      ttft′ = TTFT_prof(isl′)
    N_D  = ceil(rate′ · osl′ · tpot′ / B),  N_P = ceil(N_D · B · ttft′ / (osl′ · tpot′))

This is Little's law on both sides. Against the released planner (``dopd_code``): N_P counts all decode
instances, N_D uses a rate, the TPOT target caps B, KV capacity is the engine's (all inferred from its
defects). Changes wait for ``patience`` intervals; published: three before scaling down.

Placement by length (threshold = forecast mean prompt): a longer prompt goes alone to the prefill instance
that is free first; a shorter one joins the fullest queue that stays within the batch's token cap and
waiting cap (inferred: best fit; the caps are unpublished); a very short one, or any while the prefill
queue is full, is prefilled on decode.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Ctx, Kind
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.common import default_answer, kind_of, or_hold
from policies.rule import Param
from policies.rules.parts.arima import planner_rule
from policies.rules.parts.disaggregated import CONDITIONAL_PARAMS, local_instance
from policies.rules.parts.layout import split_params
from policies.rules.parts.planner import (
    ISL,
    ITL,
    OSL,
    PLANNER_PARAMS,
    RATE,
    TTFT,
    adopt,
    count_roles,
    follow,
    interval_closed,
    predicted,
)
from policies.rules.parts.pools import in_prefill_pool, least_prefill
from policies.rules.parts.profile_tables import itl_prof, kv_tokens, largest_batch, tpot_slo, ttft_prof

_PARAMS = (
    *PLANNER_PARAMS,
    *CONDITIONAL_PARAMS,
    Param(
        "token_cap",
        128,
        16384,
        2048,
        log=True,
        integer=True,
        doc="tokens of a batch of short prompts (inferred)",
    ),
    Param(
        "wait_cap",
        0.0,
        1.0,
        0.2,
        doc="wait that a short prompt accepts for a batch, in TTFT targets (inferred)",
    ),
)
_PROFILE = len(_PARAMS)


@kernel
def plan(params, at, isl, osl, rate, d_corr):
    """(N_P, N_D, B) of the equations above; the profile tables stand at ``params[at]``."""
    ctx = isl + 0.5 * osl
    memory_bound = max(np.floor(kv_tokens(params, at) / max(ctx, 1.0)), 1.0)
    batch = min(memory_bound, largest_batch(params, at, ctx, tpot_slo(params, at) / d_corr))
    tpot = itl_prof(params, at, batch, ctx) * d_corr
    n_d = max(np.ceil(rate * osl * tpot / batch), 1.0)
    n_p = max(np.ceil(n_d * batch * ttft_prof(params, at, isl) / max(osl * tpot, 1e-9)), 1.0)
    return n_p, n_d, batch


@kernel
def correction(params, at, memory, n_d):
    """d_corr of the last interval, within 1/4 to 4 (inferred: one odd interval must not decide)."""
    duration = memory[TTFT] + memory[OSL] * memory[ITL]
    concurrency = max(memory[RATE] * duration / max(n_d, 1), 1.0)
    expected = itl_prof(params, at, concurrency, memory[ISL] + 0.5 * memory[OSL])
    return min(max(memory[ITL] / expected, 0.25), 4.0)


@kernel
def _reallocate(context, candidates, mask, params, memory):
    if interval_closed(context, candidates, params, memory):
        d_corr = correction(params, _PROFILE, memory, count_roles(candidates)[1])
        isl, osl, rate = predicted(memory, ISL), predicted(memory, OSL), predicted(memory, RATE)
        n_p, n_d, _ = plan(params, _PROFILE, isl, osl, rate, d_corr)
        adopt(candidates, params, memory, n_p, n_d)
    return follow(candidates, mask, memory)


@kernel
def _short_batch(context, candidates, mask, token_cap, wait_s):
    """The fullest prefill queue that this prompt still fits in, token cap and waiting cap; -1 if none."""
    best, fill = -1, -1.0
    for k in range(candidates.shape[0]):
        if in_prefill_pool(candidates, mask, k) and candidates[k, Col.WAIT_S] <= wait_s:
            queued = candidates[k, Col.QUEUE_TOKENS]
            if queued + context[Ctx.PROMPT] <= token_cap and queued > fill:
                best, fill = k, queued
    return best


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: T, patience, forecast, max_local, max_queue, token cap, wait cap, profile tables."""
    kind = kind_of(context)
    if kind == Kind.REALLOCATE:
        return _reallocate(context, candidates, mask, params, memory)
    if kind != Kind.PLACE_PREFILL:
        return default_answer(context, candidates, mask)
    choice = local_instance(context, candidates, mask, params[3], params[4])
    threshold = predicted(memory, ISL)
    threshold = threshold if threshold > 0.0 else context[Ctx.MEAN_PROMPT]
    if choice < 0 and context[Ctx.PROMPT] <= threshold:
        wait_s = params[6] * context[Ctx.TTFT_SLO_S]
        choice = _short_batch(context, candidates, mask, params[5], wait_s)
    if choice < 0:
        choice = least_prefill(candidates, mask, Col.WAIT_S, Col.QUEUE_TOKENS)
    return or_hold(choice, candidates, mask)


RULE = planner_rule(
    "dopd",
    decide,
    _PARAMS,
    split_params(),
    doc="balances prefill and decode instances by forecast load, places prompts by length",
    source="DOPD (arXiv 2511.20982), planner of liao4s/DOPD with its defects repaired",
)
