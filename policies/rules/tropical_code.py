"""Tropical, rule of the released dispatcher (Tropical-C): decode workers first, its defects repaired.

For the head of the pending queue:

    if L_r < 8192: an M worker without an unfinished prefill, decode step ≤ 0.85 s, decode tokens ≤ 400,000,
        and for all its decodes  decode_slack − prefill(r) ≥ 1 · TPOT_SLO       → fewest decode tokens
    a P worker that is idle, or whose queue keeps its targets with r added:
        arrival + TTFT_SLO − predicted_end − 1.02 · prefill(r) > 0           → fewest unfinished prompt tokens
    else keep waiting

Its queue keeps its targets when every prompt in it, r in its SJF place and each after those before it, ends in
time. Repaired: every M worker is compared (the code returns the first and shadows the length tested), prompts
under 512 tokens are not skipped. The factor 1.02 of the code is applied to r's own test only. Differences
from the README rule, and ``preemption``, are described in ``tropical``. Inferred: the split P:M.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Ctx, Kind, Need
from engine.core.kinds import Role
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.common import default_answer, hold, is_instance, kind_of, or_hold
from policies.rule import Param, Rule
from policies.rules.parts.layout import PREEMPTION_PARAMS, split_layout, split_params
from policies.rules.parts.slack import TURN_CELLS, least_filled, must_wait, no_room, remember

_PREFILL = int(Role.PREFILL)
_SAFETY = 1.02


@kernel
def _prefill_worker(context, candidates, mask):
    """The P worker with the fewest unfinished prompt tokens among those idle or in time; -1 if none."""
    best, load = -1, np.inf
    for k in range(candidates.shape[0]):
        if not is_instance(candidates, mask, k) or int(candidates[k, Col.ROLE]) != _PREFILL:
            continue
        idle = candidates[k, Col.BUSY] == 0.0 and candidates[k, Col.QUEUE_N] == 0.0
        deadline = context[Ctx.ARRIVAL_S] + context[Ctx.TTFT_SLO_S]
        work = candidates[k, Col.AHEAD_S] + candidates[k, Col.PREFILL_S]
        in_time = deadline - context[Ctx.NOW_S] - _SAFETY * work > 0.0
        if idle or (in_time and candidates[k, Col.QUEUE_SLACK_S] > 0.0):
            if candidates[k, Col.QUEUE_TOKENS] < load:
                best, load = k, candidates[k, Col.QUEUE_TOKENS]
    return best


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: length gate, margin, step limit, token limit, head only (0, 1)."""
    if kind_of(context) != Kind.PLACE_PREFILL:
        return default_answer(context, candidates, mask)
    if params[4] == 1.0 and must_wait(context, memory):
        return or_hold(no_room(context, candidates, mask, 0.0), candidates, mask)
    choice = -1
    if context[Ctx.PROMPT] < params[0]:
        choice = least_filled(context, candidates, mask, params[1], params[2], params[3], 1.0)
    if choice < 0:
        choice = _prefill_worker(context, candidates, mask)
    remember(context, memory, choice >= 0)
    if choice < 0:
        choice = no_room(context, candidates, mask, 0.0)
    return choice if choice >= 0 else hold(candidates, mask)


RULE = Rule(
    name="tropical_code",
    doc="prefill on decode workers with slack first, then on prefill workers in time (released dispatcher)",
    source="Tropical (DAC 2025, arXiv 2606.16264), core/global_scheduler.py of tropical-project",
    decide=decide,
    needs=Need.LOAD | Need.PREDICT | Need.QUEUE,
    memory_size=TURN_CELLS,
    params=(
        Param("length_gate", 0, 131072, 8192, integer=True, doc="prompts this long never go to an M worker"),
        Param("margin", 0.0, 20.0, 1.0, doc="slack to keep on an M worker, in TPOT targets"),
        Param("step_limit_s", 0.01, 10.0, 0.85, log=True, doc="decode step above which M takes no prefill"),
        Param("token_limit", 1000, 10_000_000, 400_000, log=True, integer=True, doc="the same for decode tokens"),
        Param(
            "queue",
            default="head",
            choices=("all", "head"),
            doc="ask for every pending request, or the oldest",
        ),
        *PREEMPTION_PARAMS,
        *split_params(prefill_tokens=None),
    ),
    arrange=split_layout("tropical_code", order=1),
)
