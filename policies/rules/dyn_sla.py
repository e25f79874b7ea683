"""DYN-SLA: Dynamo's planner that keeps throughput per instance above the load, the stronger opponent of DOPD.

    p_corr = ttft / TTFT_prof(isl),     d_corr = itl / ITL_prof(concurrency, isl + osl/2)
    N_P = ceil(rate′ · isl′ · min(1, p_corr) / thpt_P(isl′)),         thpt_P(isl) = isl / TTFT_prof(isl)
    N_D = ceil(rate′ · osl′ / thpt_D(ITL_SLO / d_corr, ctx′)),  thpt_D = b / ITL_prof(b, ctx) at the largest b
                                                                  whose ITL_prof stays within the target

(g_P = g_D = 1 instance.) The forecast is DOPD's; plans are fitted to a fixed fleet (inferred, see
``planner``). Placement: conditional disaggregation with a FCFS prefill queue.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Kind
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.common import kind_of
from policies.rules.dopd import correction
from policies.rules.parts.arima import planner_rule
from policies.rules.parts.disaggregated import CONDITIONAL_PARAMS, answer_conditionally
from policies.rules.parts.layout import split_params
from policies.rules.parts.planner import (
    ISL,
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
from policies.rules.parts.profile_tables import itl_prof, largest_batch, tpot_slo, ttft_prof

_PARAMS = (*PLANNER_PARAMS, *CONDITIONAL_PARAMS)
_PROFILE = len(_PARAMS)


@kernel
def plan(params, at, isl, osl, rate, p_corr, d_corr):
    """(N_P, N_D) of the equations above; the profile tables stand at ``params[at]``."""
    prefill_throughput = isl / ttft_prof(params, at, isl)
    ctx = isl + 0.5 * osl
    batch = largest_batch(params, at, ctx, tpot_slo(params, at) / d_corr)
    decode_throughput = batch / itl_prof(params, at, batch, ctx)
    n_p = np.ceil(rate * isl * min(1.0, p_corr) / max(prefill_throughput, 1e-9))
    n_d = np.ceil(rate * osl / max(decode_throughput, 1e-9))
    return max(n_p, 1.0), max(n_d, 1.0)


@kernel
def _reallocate(context, candidates, mask, params, memory):
    if interval_closed(context, candidates, params, memory):
        p_corr = memory[TTFT] / ttft_prof(params, _PROFILE, memory[ISL])
        d_corr = correction(params, _PROFILE, memory, count_roles(candidates)[1])
        isl, osl, rate = predicted(memory, ISL), predicted(memory, OSL), predicted(memory, RATE)
        n_p, n_d = plan(params, _PROFILE, isl, osl, rate, p_corr, d_corr)
        adopt(candidates, params, memory, n_p, n_d)
    return follow(candidates, mask, memory)


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: T, patience, forecast, max_local, max_queue, profile tables."""
    if kind_of(context) == Kind.REALLOCATE:
        return _reallocate(context, candidates, mask, params, memory)
    return answer_conditionally(context, candidates, mask, params[3], params[4])


RULE = planner_rule(
    "dyn_sla",
    decide,
    _PARAMS,
    split_params(prefill_tokens=None),
    doc="Dynamo's SLA planner: instances from forecast load and profiled throughput under the targets",
    source="NVIDIA Dynamo SLA planner, as opposed to DOPD in arXiv 2511.20982 (DYN-SLA)",
)
