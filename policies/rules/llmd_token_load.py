"""llm-d default idea: find what limits throughput and route on the signal that tracks that limit.

    prefill-bound → fewest prompt tokens to compute, this prompt's uncached part included
    decode-bound  → least KV memory in use, running and inbound

The published text gives the principle, not the test. Inferred: the bottleneck is the larger of prefill
utilisation (arrival rate × mean isolated prefill ÷ prefill-capable instances) × ``bias`` and decode
utilisation (seats in demand, or mean KV use where that is higher). Ties go by the other signal.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Ctx, Kind, Need
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.common import default_answer, kind_of, least, or_hold
from policies.rule import Param, Rule
from policies.rules.parts.layout import ROUTER_PARAMS, router_layout
from policies.rules.parts.pools import in_prefill_pool, tokens


@kernel
def _place_prefill(context, candidates, mask, bias):
    prefill_bound = bias * context[Ctx.PREFILL_RHO] >= max(context[Ctx.DECODE_RHO], context[Ctx.KV_MEAN])
    best, first, second = -1, np.inf, np.inf
    for k in range(candidates.shape[0]):
        if in_prefill_pool(candidates, mask, k):
            compute = candidates[k, Col.QUEUE_TOKENS] - candidates[k, Col.CACHED_TOKENS]
            kv = tokens(candidates, k) / max(candidates[k, Col.TOTAL_BLOCKS], 1.0)
            a, b = (compute, kv) if prefill_bound else (kv, compute)
            if best < 0 or a < first or (a == first and b < second):
                best, first, second = k, a, b
    return best if best >= 0 else least(candidates, mask, Col.OUTSTANDING)


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: bias."""
    if kind_of(context) != Kind.PLACE_PREFILL:
        return default_answer(context, candidates, mask)
    return or_hold(_place_prefill(context, candidates, mask, params[0]), candidates, mask)


RULE = Rule(
    name="llmd_token_load",
    doc="fewest uncached prompt tokens while prefill limits throughput, least KV use while decode does",
    source="llm-d, routing on the signal that tracks the bottleneck (2026 default)",
    decide=decide,
    needs=Need.LOAD | Need.PREDICT | Need.DIMENSIONLESS,
    params=(
        Param("bias", 0.05, 20.0, 1.0, log=True, doc="weight of prefill when the bottleneck is named (inferred)"),
        *ROUTER_PARAMS,
    ),
    arrange=router_layout("llmd_token_load"),
)
