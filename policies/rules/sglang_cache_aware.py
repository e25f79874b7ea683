"""SGLang router, cache_aware: prefix affinity while loads are balanced, shortest queue when they are not.

    imbalanced: max_load − min_load > balance_abs  and  max_load > balance_rel · min_load   → least load
    else: best prefix match ÷ prompt > cache_threshold → the worker with that match, otherwise least load

Load = requests outstanding at a worker. The router guesses matches with a radix tree of its own; here the
worker's prefix cache is asked (``CACHED_TOKENS``), which is what its tree approximates. With prefill and
decode workers the rule places prefills, and decodes go to the least loaded.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Ctx, Kind, Need
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.common import default_answer, kind_of, least, or_hold
from policies.rule import Param, Rule
from policies.rules.parts.layout import ROUTER_PARAMS, router_layout
from policies.rules.parts.pools import in_prefill_pool, requests


@kernel
def _place_prefill(context, candidates, mask, params):
    idlest, low, high, match, cached = -1, np.inf, -np.inf, -1, 0.0
    for k in range(candidates.shape[0]):
        if in_prefill_pool(candidates, mask, k):
            load = requests(candidates, k)
            if load < low:
                idlest, low = k, load
            high = max(high, load)
            if candidates[k, Col.CACHED_TOKENS] > cached:
                match, cached = k, candidates[k, Col.CACHED_TOKENS]
    if idlest < 0:
        return least(candidates, mask, Col.QUEUE_N)
    if high - low > params[0] and high > params[1] * low:
        return idlest
    return match if match >= 0 and cached > params[2] * context[Ctx.PROMPT] else idlest


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: balance_abs, balance_rel, cache_threshold."""
    if kind_of(context) != Kind.PLACE_PREFILL:
        return default_answer(context, candidates, mask)
    return or_hold(_place_prefill(context, candidates, mask, params), candidates, mask)


RULE = Rule(
    name="sglang_cache_aware",
    doc="longest cached prefix unless loads are imbalanced or the match is short, then least requests",
    source="SGLang router, policy cache_aware (thresholds 32, 1.1 and 0.5)",
    decide=decide,
    needs=Need.LOAD | Need.PREDICT,
    params=(
        Param("balance_abs", 0, 512, 32, integer=True, doc="requests by which loads may differ"),
        Param("balance_rel", 1.0, 10.0, 1.1, log=True, doc="ratio by which loads may differ"),
        Param("cache_threshold", 0.0, 1.0, 0.5, doc="share of the prompt that must be cached"),
        *ROUTER_PARAMS,
    ),
    arrange=router_layout("sglang_cache_aware"),
)
