"""Splitwise: a prompt pool, a token pool, and a mixed pool of machines on loan between them.

    prompt: the machine with the fewest pending tokens, first in the prompt pool, then in the mixed pool; a
            queue is long when it is not empty and pending + prompt tokens > cap; both long → borrow the
            token machine with the fewest pending tokens, which is mixed until it has no prompts left
    token:  the machine with the least memory in use

(splitwise-sim, MixedPoolScheduler; cap 8192 as in its configurations.) A mixed machine here is a decode
instance with prompts in its queue. Not reproduced: a prompt machine lent to the token pool when memory is
full, because an instance of role PREFILL cannot decode.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Ctx, Kind, Need
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.common import default_answer, is_instance, kind_of, least, or_hold, stay_in_place
from policies.rule import Param, Rule
from policies.rules.parts.layout import split_layout, split_params
from policies.rules.parts.pools import in_decode_pool, in_prefill_pool, kv_use

_PROMPT_POOL, _MIXED_POOL, _TOKEN_POOL = 0, 1, 2


@kernel
def _pool_of(candidates, mask, k):
    if in_prefill_pool(candidates, mask, k):
        return _PROMPT_POOL
    if in_decode_pool(candidates, mask, k):
        return _MIXED_POOL if candidates[k, Col.QUEUE_N] > 0.0 else _TOKEN_POOL
    return -1


@kernel
def _pending(candidates, k):
    """Tokens the next iterations have to work on: prompts, and one per running sequence."""
    return candidates[k, Col.QUEUE_TOKENS] + candidates[k, Col.RUN_N]


@kernel
def _shortest(candidates, mask, pool):
    best, pending = -1, np.inf
    for k in range(candidates.shape[0]):
        if _pool_of(candidates, mask, k) == pool and _pending(candidates, k) < pending:
            best, pending = k, _pending(candidates, k)
    return best


@kernel
def _place_prefill(context, candidates, mask, cap):
    for pool in range(_TOKEN_POOL):
        k = _shortest(candidates, mask, pool)
        if k >= 0:
            if candidates[k, Col.QUEUE_N] == 0.0 or _pending(candidates, k) + context[Ctx.PROMPT] <= cap:
                return k
    borrowed = _shortest(candidates, mask, _TOKEN_POOL)
    return borrowed if borrowed >= 0 else least(candidates, mask, Col.QUEUE_TOKENS)


@kernel
def _least_memory(candidates, mask):
    best, used = -1, np.inf
    for k in range(candidates.shape[0]):
        if is_instance(candidates, mask, k):
            here = kv_use(candidates, k)
            if best < 0 or here < used:
                best, used = k, here
    return best


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: cap, tokens."""
    kind = kind_of(context)
    if kind == Kind.PLACE_PREFILL:
        return or_hold(_place_prefill(context, candidates, mask, params[0]), candidates, mask)
    if kind == Kind.PLACE_DECODE:
        stay = stay_in_place(context, candidates, mask)
        return or_hold(stay if stay >= 0 else _least_memory(candidates, mask), candidates, mask)
    return default_answer(context, candidates, mask)


RULE = Rule(
    name="splitwise",
    doc="prompt pool by pending tokens, token pool by memory, token machines borrowed for prompts in a rush",
    source="Splitwise (ISCA 2024), MixedPoolScheduler of splitwise-sim",
    decide=decide,
    needs=Need.LOAD,
    params=(
        Param("cap", 256, 131072, 8192, log=True, integer=True, doc="pending tokens from which a queue is long"),
        *split_params(),
    ),
    arrange=split_layout("splitwise"),
)
