"""Conditional disaggregation (Dynamo, DOPD): long prompts go to prefill instances, short ones stay on decode.

Released rule: prefill remotely only if the uncached prompt is longer than ``max_local_prefill_length``
*and* the prefill queue is shorter than ``max_prefill_queue_size``; otherwise on the decode instance.
Prefill workers take one request at a time from a shared queue, which the least predicted wait reproduces
without a shared queue.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Ctx, Kind
from engine.jit.kernel import kernel
from policies.common import default_answer, kind_of, or_hold
from policies.rule import Param
from policies.rules.parts.pools import in_decode_pool, in_prefill_pool, least_prefill, tokens, waiting

CONDITIONAL_PARAMS = (
    Param(
        "max_local_prefill",
        0,
        8192,
        511,
        integer=True,
        doc="uncached tokens prefilled on decode; configs 10, 511",
    ),
    Param("max_prefill_queue", 1, 64, 16, integer=True, doc="waiting prompts per cluster; configs 2, 8, 16"),
)


@kernel
def _queue_size(candidates, mask):
    size, pool = 0.0, 0
    for k in range(candidates.shape[0]):
        if in_prefill_pool(candidates, mask, k):
            size += waiting(candidates, k)
            pool += 1
    return size if pool > 0 else np.inf


@kernel
def local_instance(context, candidates, mask, max_local, max_queue):
    """Decode instance that should prefill this prompt itself, or -1.

    Candidate: prefix match and load, counted as context + queue − cached tokens (inferred: the released cost
    weighs them by scores of its own).
    """
    best, cost = -1, np.inf
    for k in range(candidates.shape[0]):
        if in_decode_pool(candidates, mask, k):
            load = tokens(candidates, k) + candidates[k, Col.QUEUE_TOKENS] - candidates[k, Col.CACHED_TOKENS]
            if best < 0 or load < cost:
                best, cost = k, load
    if best < 0:
        return -1
    uncached = context[Ctx.PROMPT] - candidates[best, Col.CACHED_TOKENS]
    remote = uncached > max_local and _queue_size(candidates, mask) < max_queue
    return -1 if remote else best


@kernel
def answer_conditionally(context, candidates, mask, max_local, max_queue):
    """Answer to everything but REALLOCATE: prompts local where the rule says so, else to the prefill instance that is
    free first."""
    if kind_of(context) != Kind.PLACE_PREFILL:
        return default_answer(context, candidates, mask)
    choice = local_instance(context, candidates, mask, max_local, max_queue)
    if choice < 0:
        choice = least_prefill(candidates, mask, Col.WAIT_S, Col.QUEUE_TOKENS)
    return or_hold(choice, candidates, mask)
