"""Tropical, rule of the README (Tropical-R): a prompt runs on a decode worker while its decodes have slack.

Workers: P prefills one prompt at a time, shortest first; M decodes and may take one whole prefill. For the
oldest pending request r, until it is placed:

    1. a P worker is idle                                                          → there
    2. a P worker runs, nothing is queued, predicted_end + prefill(r) ≤ arrival + TTFT_SLO  → there
    3. an M worker is below its watermark and holds no unfinished prefill, and for all its decodes
       decode_slack − prefill(r) ≥ margin · TPOT_SLO                          → the one with the fewest tokens
    4. else wait, ask again; reject after a timeout

    decode_slack(q) = first_token_time + TPOT_SLO · max(1, outputs) − now

The slack test with its margin of one TPOT_SLO is the released code's; the README compares slack >
prefill(r) (``margin=0``). Inferred: the watermark (a share of KV memory), the split P:M, no rejection by
default. Where HOLD is not a lever the least loaded P takes what would have waited. ``preemption=chunked`` is
the repository's option "SLO-aware chunked preemption": before every chunk a P worker orders what runs and
what waits by predicted remaining prefill; M workers run prompts whole as before.
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
from policies.rules.parts.pools import waiting
from policies.rules.parts.slack import TURN_CELLS, least_filled, must_wait, no_room, remember

_PREFILL = int(Role.PREFILL)


@kernel
def _prefill_worker(context, candidates, mask):
    """Step 1, then step 2: an idle P worker, or the one that ends first of those in time; -1 if none."""
    best, ttft = -1, np.inf
    for k in range(candidates.shape[0]):
        if not is_instance(candidates, mask, k) or int(candidates[k, Col.ROLE]) != _PREFILL:
            continue
        if candidates[k, Col.BUSY] == 0.0 and candidates[k, Col.QUEUE_N] == 0.0:
            return k
        in_time = candidates[k, Col.TTFT_S] <= context[Ctx.TTFT_SLO_S]
        if waiting(candidates, k) == 0.0 and in_time and candidates[k, Col.TTFT_S] < ttft:
            best, ttft = k, candidates[k, Col.TTFT_S]
    return best


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: margin, watermark, head only (0, 1), reject_s."""
    if kind_of(context) != Kind.PLACE_PREFILL:
        return default_answer(context, candidates, mask)
    if params[2] == 1.0 and must_wait(context, memory):
        return or_hold(no_room(context, candidates, mask, params[3]), candidates, mask)
    choice = _prefill_worker(context, candidates, mask)
    if choice < 0:
        choice = least_filled(context, candidates, mask, params[0], np.inf, np.inf, params[1])
    remember(context, memory, choice >= 0)
    if choice < 0:
        choice = no_room(context, candidates, mask, params[3])
    return choice if choice >= 0 else hold(candidates, mask)


RULE = Rule(
    name="tropical",
    doc="prefill on idle P, else on decode workers whose TPOT slack covers it, else wait (README rule)",
    source="Tropical (DAC 2025, arXiv 2606.16264), README of tropical-project, slack test of its dispatcher",
    decide=decide,
    needs=Need.LOAD | Need.PREDICT,
    memory_size=TURN_CELLS,
    params=(
        Param("margin", 0.0, 20.0, 1.0, doc="slack to keep on an M worker, in TPOT targets"),
        Param("watermark", 0.1, 1.0, 0.9, doc="KV use above which an M worker takes no prefill (inferred)"),
        Param(
            "queue",
            default="head",
            choices=("all", "head"),
            doc="ask for every pending request, or the oldest",
        ),
        Param(
            "reject_s",
            0.0,
            600.0,
            0.0,
            doc="wait after which a request is refused where SHED is allowed; 0: never",
        ),
        *PREEMPTION_PARAMS,
        *split_params(prefill_tokens=None),
    ),
    arrange=split_layout("tropical", order=1),
)
