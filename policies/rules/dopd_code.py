"""DOPD, planner as released, with what is wrong in it (``dopd`` is the repaired one).

    blocks = ceil((isl′ + osl′/2) / 128),   B = floor(2040 / blocks)
    tpot′  = ITL_prof(B, isl′ + osl′/2) · d_corr,   ttft′ = TTFT_prof(isl′)
    N_P    = ceil(B · ttft′ / (osl′ · tpot′)),      N_D = ceil(req′ / B)

Kept on purpose: N_P is per *one* decode instance; N_D takes the requests of a whole interval as if they
ran at once; 2,040 blocks of 128 tokens per decode instance whatever the hardware; the TPOT target caps
nothing; the TTFT correction enters nowhere. d_corr as in ``dopd``. Placement is the released conditional
disaggregation with a FCFS prefill queue. Spare instances follow the plan in proportion (inferred, see
``planner``); ``patience`` 1: the code has no hysteresis.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Kind
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.common import kind_of
from policies.rule import Param
from policies.rules.dopd import correction
from policies.rules.parts.arima import planner_rule
from policies.rules.parts.disaggregated import CONDITIONAL_PARAMS, answer_conditionally
from policies.rules.parts.layout import split_params
from policies.rules.parts.planner import (
    ISL,
    OSL,
    PLANNER_PARAMS,
    RATE,
    adopt,
    count_roles,
    follow,
    interval_closed,
    predicted,
)
from policies.rules.parts.profile_tables import itl_prof, ttft_prof

_BLOCK_TOKENS = 128
_PARAMS = (
    PLANNER_PARAMS[0],
    Param("patience", 1, 10, 1, integer=True, doc="intervals that must agree; the released code has none"),
    PLANNER_PARAMS[2],
    *CONDITIONAL_PARAMS,
    Param("kv_blocks", 16, 100_000, 2040, log=True, integer=True, doc="hard-coded blocks of 128 tokens per D"),
)
_PROFILE = len(_PARAMS)


@kernel
def concurrency(kv_blocks, isl, osl):
    """B: requests that fit on one decode instance at once."""
    return max(np.floor(kv_blocks / max(np.ceil((isl + 0.5 * osl) / _BLOCK_TOKENS), 1.0)), 1.0)


@kernel
def plan(batch, ttft, tpot, osl, requests):
    """(N_P, N_D), each at least 1."""
    n_p = max(np.ceil(batch * ttft / max(osl * tpot, 1e-9)), 1.0)
    return n_p, max(np.ceil(requests / batch), 1.0)


@kernel
def _reallocate(context, candidates, mask, params, memory):
    if interval_closed(context, candidates, params, memory):
        isl, osl = predicted(memory, ISL), predicted(memory, OSL)
        batch = concurrency(params[5], isl, osl)
        d_corr = correction(params, _PROFILE, memory, count_roles(candidates)[1])
        tpot = itl_prof(params, _PROFILE, batch, isl + 0.5 * osl) * d_corr
        requests = predicted(memory, RATE) * params[0]
        n_p, n_d = plan(batch, ttft_prof(params, _PROFILE, isl), tpot, osl, requests)
        adopt(candidates, params, memory, n_p, n_d)
    return follow(candidates, mask, memory)


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: T, patience, forecast, max_local, max_queue, kv_blocks, profile tables."""
    if kind_of(context) == Kind.REALLOCATE:
        return _reallocate(context, candidates, mask, params, memory)
    return answer_conditionally(context, candidates, mask, params[3], params[4])


RULE = planner_rule(
    "dopd_code",
    decide,
    _PARAMS,
    split_params(prefill_tokens=None),
    doc="DOPD's planner exactly as released, defects included",
    source="liao4s/DOPD, components/planner_dopd.py (arXiv 2511.20982)",
)
