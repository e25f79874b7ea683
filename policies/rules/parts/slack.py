"""Slack of decodes and the turn of the oldest: what both variants of Tropical are made of."""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Ctx
from engine.core.kinds import Role
from engine.jit.kernel import kernel
from policies.common import is_instance
from policies.rules.parts.pools import kv_use, least_prefill, row_of, tokens

_PREFILL = int(Role.PREFILL)
#: Arrival of the request at the head of the dispatcher, and when it was last asked about (seconds, + 1).
_HEAD, _ASKED = 0, 1
TURN_CELLS = 2
#: A head not asked about for this long was placed by somebody else (a guard, another policy).
_FORGOTTEN_S = 1.0


@kernel
def over_limit(candidates, k, step_limit_s, token_limit, watermark):
    """Whether worker ``k`` decodes too much already: step time, context tokens, or memory."""
    return (
        candidates[k, Col.STEP_S] > step_limit_s
        or tokens(candidates, k) > token_limit
        or kv_use(candidates, k) > watermark
    )


@kernel
def least_filled(context, candidates, mask, margin, step_limit_s, token_limit, watermark):
    """The multiplexing worker to take a prompt, or -1.

    Eligible: no unfinished prefill, below its limits, and for every running decode
    ``first token + TPOT_SLO · outputs − now − prefill(r) ≥ margin · TPOT_SLO``. The eligible worker with the
    fewest decode tokens wins. TPOT_SLO of the margin is the prompt's own (inferred for several classes).
    """
    best, load = -1, np.inf
    for k in range(candidates.shape[0]):
        if not is_instance(candidates, mask, k) or int(candidates[k, Col.ROLE]) == _PREFILL:
            continue
        if candidates[k, Col.QUEUE_N] > 0.0 or over_limit(candidates, k, step_limit_s, token_limit, watermark):
            continue
        left = candidates[k, Col.MIN_SLACK_S] - candidates[k, Col.PREFILL_S]
        here = tokens(candidates, k)
        if left >= margin * context[Ctx.TPOT_SLO_S] and here < load:
            best, load = k, here
    return best


@kernel
def must_wait(context, memory):
    """Whether an older request is still at the head of the dispatcher's queue."""
    now = context[Ctx.NOW_S]
    if memory[_ASKED] == 0.0 or now + 1.0 - memory[_ASKED] > _FORGOTTEN_S or context[Ctx.HELD_N] == 0.0:
        memory[_ASKED] = 0.0
        return False
    return context[Ctx.ARRIVAL_S] > memory[_HEAD]


@kernel
def remember(context, memory, placed):
    """Note that the head was placed, or that this request is the head now."""
    memory[_HEAD] = context[Ctx.ARRIVAL_S]
    memory[_ASKED] = 0.0 if placed else context[Ctx.NOW_S] + 1.0


@kernel
def no_room(context, candidates, mask, reject_s):
    """No worker qualifies: SHED after ``reject_s`` where allowed (0: never), else HOLD, else the prefill
    worker that is free first."""
    if reject_s > 0.0 and context[Ctx.NOW_S] - context[Ctx.ARRIVAL_S] > reject_s:
        shed = row_of(candidates, mask, Col.IS_SHED)
        if shed >= 0:
            return shed
    held = row_of(candidates, mask, Col.IS_HOLD)
    return held if held >= 0 else least_prefill(candidates, mask, Col.WAIT_S, Col.QUEUE_TOKENS)
