"""Mooncake: Conductor's choice of the prefill instance by predicted TTFT with prefix hits, and early
rejection.

    TTFT_i = T_queue(i) + T_prefill(prompt, prefix cached on i)           → the least, over prefill instances
    decode: the instance with the least predicted TBT
    reject if TTFT_i > TTFT_SLO or TBT > TBT_SLO

(FAST 2025, algorithm 1.) Early rejection tests decode when the request arrives, not after its prefill was
paid for. ``decode_load=predicted`` adds what will arrive before it: the paper predicts decode load at the
time the prefill ends; here that is today's step plus the queued prompts spread over the decode instances,
with none of the running ones gone (inferred, errs towards rejecting). Not reproduced: fetching a better
prefix from another instance; no lever moves cached KV. Rejection needs a scenario that allows SHED.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Ctx, Kind, Need
from engine.core.kinds import Role
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.common import default_answer, is_instance, kind_of, or_hold
from policies.rule import Param, Rule
from policies.rules.parts.layout import split_layout, split_params
from policies.rules.parts.pools import in_prefill_pool, least_prefill, row_of
from policies.rules.parts.profile_tables import itl_prof, with_tables

_PREFILL = int(Role.PREFILL)
_OFF, _NOW, _PREDICTED = 0, 1, 2
_PROFILE = 1


@kernel
def _step(params, batch, context_tokens):
    return itl_prof(params, _PROFILE, batch, context_tokens / batch) if batch > 0.0 else 0.0


@kernel
def _least_tbt(candidates, mask, params):
    """Least predicted decode step over instances that decode, with this request; infinity: none does."""
    queued_n, queued_tokens, decoders = 0.0, 0.0, 0
    for k in range(candidates.shape[0]):
        if is_instance(candidates, mask, k):
            queued_n += candidates[k, Col.QUEUE_N] if in_prefill_pool(candidates, mask, k) else 0.0
            queued_tokens += candidates[k, Col.QUEUE_TOKENS] if in_prefill_pool(candidates, mask, k) else 0.0
            decoders += 0 if int(candidates[k, Col.ROLE]) == _PREFILL else 1
    tbt = np.inf
    for k in range(candidates.shape[0]):
        if is_instance(candidates, mask, k) and int(candidates[k, Col.ROLE]) != _PREFILL:
            here = candidates[k, Col.STEP_WITH_S]
            if params[0] == _PREDICTED:
                batch = candidates[k, Col.RUN_N] + candidates[k, Col.INBOUND_N]
                held = candidates[k, Col.RUN_CTX] + candidates[k, Col.INBOUND_TOKENS]
                later = _step(params, batch + queued_n / decoders, held + queued_tokens / decoders)
                here += max(later - _step(params, batch, held), 0.0) if batch > 0.0 else later
            tbt = min(tbt, here)
    return tbt


@kernel
def _place_prefill(context, candidates, mask, params):
    choice = least_prefill(candidates, mask, Col.TTFT_S, Col.QUEUE_TOKENS)
    if choice < 0 or params[0] == _OFF:
        return choice
    shed = row_of(candidates, mask, Col.IS_SHED)
    if shed < 0:
        return choice
    late = candidates[choice, Col.TTFT_S] > context[Ctx.TTFT_SLO_S]
    return shed if late or _least_tbt(candidates, mask, params) > context[Ctx.TPOT_SLO_S] else choice


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: rejection (0 off, 1 now, 2 predicted), profile tables."""
    if kind_of(context) != Kind.PLACE_PREFILL:
        return default_answer(context, candidates, mask)
    return or_hold(_place_prefill(context, candidates, mask, params), candidates, mask)


_REJECTION = Param(
    "rejection",
    default="predicted",
    choices=("off", "now", "predicted"),
    doc="early rejection where SHED is allowed, by today's decode load or by the predicted one",
)
RULE = Rule(
    name="mooncake",
    doc="least predicted TTFT with prefix hits, early rejection by predicted decode load",
    source="Mooncake (FAST 2025, arXiv 2407.00079), algorithm 1 and early rejection based on prediction",
    decide=decide,
    needs=Need.LOAD | Need.PREDICT,
    params=(_REJECTION, *split_params()),
    prepare=with_tables((_REJECTION,)),
    arrange=split_layout("mooncake"),
)
