"""llm-d predicted-latency routing: headroom to the targets, tiers, a pinch of exploration.

    headroom = SLO − predicted, for TTFT and TPOT;  positive tier: both ≥ 0, negative tier: the rest
    affinity: only pods whose cached share of the prompt is ≥ τ compete, if there are any and the best of
        them is not slower than the best of all by more than ``max_penalty_s`` (τ = 0.99 over all pods, then
        0.80 within the tier); skipped with probability ε
    tier: positive; the negative one with probability ε, or when it is all there is
    positive: normalised headroom 0.8 · TTFT + 0.2 · TPOT, least first (bin packing) or most first
    negative: idle pods first, then only TPOT violated, then only TTFT, then both; least deficit
        0.8 / 0.2 within

    predicted TPOT = decode step with r + prefill of min(queued tokens, chunk) tokens on a MIXED pod

Names and defaults are those of the latency scorer. Predictions come from the latency profile instead of
llm-d's learned models, whose TPOT is that of live requests and sees prefill tokens in flight and whether anyone
is queued: on a pod with a backlog every decode step carries a chunk, hence the second term (inferred form;
without it bin packing fills one pod with prompts until its decodes miss). A dimension in which all pods agree
gives its weight to the other.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Ctx, Kind, Need
from engine.core.kinds import Role
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.common import default_answer, kind_of, least, or_hold
from policies.rule import Param, Rule
from policies.rules.parts.draws import uniform
from policies.rules.parts.layout import ROUTER_PARAMS, router_layout
from policies.rules.parts.pools import in_prefill_pool, requests

_ANY, _POSITIVE, _NEGATIVE = 0, 1, 2
_MIXED = int(Role.MIXED)
_TTFT_WEIGHT = 0.8


@kernel
def _tpot(context, candidates, k):
    """Predicted TPOT of the request on pod ``k``, seconds."""
    step = candidates[k, Col.STEP_WITH_S]
    if int(candidates[k, Col.ROLE]) != _MIXED:
        return step
    per_token = candidates[k, Col.PREFILL_S] / max(context[Ctx.PROMPT] - candidates[k, Col.CACHED_TOKENS], 1.0)
    return step + per_token * min(candidates[k, Col.QUEUE_TOKENS], candidates[k, Col.CHUNK_TOKENS])


@kernel
def _headroom(context, candidates, k):
    """(TTFT, TPOT) headroom of pod ``k``, seconds."""
    ttft = context[Ctx.TTFT_SLO_S] - candidates[k, Col.TTFT_S]
    return ttft, context[Ctx.TPOT_SLO_S] - _tpot(context, candidates, k)


@kernel
def _competes(context, candidates, mask, k, tier, floor):
    """Whether pod ``k`` is in ``tier`` and has at least the share ``floor`` of the prompt cached."""
    if not in_prefill_pool(candidates, mask, k):
        return False
    if candidates[k, Col.CACHED_TOKENS] < floor * context[Ctx.PROMPT]:
        return False
    ttft, tpot = _headroom(context, candidates, k)
    met = ttft >= 0.0 and tpot >= 0.0
    return tier == _ANY or met == (tier == _POSITIVE)


@kernel
def _sticky_floor(context, candidates, mask, tier, floor, tau, max_penalty_s):
    """``tau`` where the affinity gate holds within (tier, floor), else ``floor``."""
    sticky, best = np.inf, np.inf
    for k in range(candidates.shape[0]):
        if _competes(context, candidates, mask, k, tier, floor):
            ttft = candidates[k, Col.TTFT_S]
            best = min(best, ttft)
            if candidates[k, Col.CACHED_TOKENS] >= tau * context[Ctx.PROMPT]:
                sticky = min(sticky, ttft)
    broken = sticky == np.inf or (max_penalty_s > 0.0 and sticky - best > max_penalty_s)
    return floor if broken or tau <= 0.0 else max(floor, tau)


@kernel
def _rank(context, candidates, k):
    """Order of a pod in the negative tier: idle, only TPOT violated, only TTFT, both."""
    if requests(candidates, k) == 0.0:
        return 0
    ttft, tpot = _headroom(context, candidates, k)
    return 1 if ttft >= 0.0 else (2 if tpot >= 0.0 else 3)


@kernel
def _blend(value, low, high):
    return (value - low) / (high - low) if high > low else 0.0


@kernel
def _best(context, candidates, mask, tier, floor, most):
    """The winner within (tier, floor), -1 if nobody competes. ``most`` turns bin packing into spreading."""
    rank = 9
    for k in range(candidates.shape[0]):
        if tier == _NEGATIVE and _competes(context, candidates, mask, k, tier, floor):
            rank = min(rank, _rank(context, candidates, k))
    low_t, high_t, low_p, high_p = np.inf, -np.inf, np.inf, -np.inf
    for k in range(candidates.shape[0]):
        if _competes(context, candidates, mask, k, tier, floor):
            if tier == _NEGATIVE and _rank(context, candidates, k) != rank:
                continue
            ttft, tpot = _headroom(context, candidates, k)
            low_t, high_t = min(low_t, ttft), max(high_t, ttft)
            low_p, high_p = min(low_p, tpot), max(high_p, tpot)
    weight = 1.0 if high_p <= low_p else (0.0 if high_t <= low_t else _TTFT_WEIGHT)
    spread = most or tier == _NEGATIVE
    best, score = -1, np.inf
    for k in range(candidates.shape[0]):
        if _competes(context, candidates, mask, k, tier, floor):
            if tier == _NEGATIVE and _rank(context, candidates, k) != rank:
                continue
            ttft, tpot = _headroom(context, candidates, k)
            here = weight * _blend(ttft, low_t, high_t) + (1.0 - weight) * _blend(tpot, low_p, high_p)
            here = -here if spread else here
            if best < 0 or here < score:
                best, score = k, here
    return best


@kernel
def _place_prefill(context, candidates, mask, params, memory):
    explore_affinity = uniform(memory, 0, params[5]) < params[4]
    explore_tier = uniform(memory, 0, params[5]) < params[4]
    floor = 0.0
    if not explore_affinity:
        floor = _sticky_floor(context, candidates, mask, _ANY, 0.0, params[1], params[3])
    positive = negative = False
    for k in range(candidates.shape[0]):
        positive = positive or _competes(context, candidates, mask, k, _POSITIVE, floor)
        negative = negative or _competes(context, candidates, mask, k, _NEGATIVE, floor)
    tier = _NEGATIVE if negative and (explore_tier or not positive) else _POSITIVE
    if not explore_affinity:
        floor = _sticky_floor(context, candidates, mask, tier, floor, params[2], params[3])
    return _best(context, candidates, mask, tier, floor, params[0] == 1.0)


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: strategy (0 least, 1 most), global τ, τ, max penalty, ε, seed."""
    if kind_of(context) != Kind.PLACE_PREFILL:
        return default_answer(context, candidates, mask)
    choice = _place_prefill(context, candidates, mask, params, memory)
    if choice < 0:
        choice = least(candidates, mask, Col.TTFT_S)
    return or_hold(choice, candidates, mask)


RULE = Rule(
    name="llmd_latency",
    doc="predicted headroom to both targets: pack the tightest pod that meets them, tiers when none does",
    source="llm-d router, latency scorer (predicted-latency routing)",
    decide=decide,
    needs=Need.LOAD | Need.PREDICT,
    params=(
        Param("strategy", default="least", choices=("least", "most"), doc="headroomSelectionStrategy"),
        Param("tau_global", 0.0, 1.0, 0.99, off=0.05, doc="affinityGateTauGlobal; 0: off"),
        Param("tau", 0.0, 1.0, 0.8, off=0.05, doc="affinityGateTau; 0: off"),
        Param("max_penalty_s", 0.0, 60.0, 5.0, off=0.1, doc="affinityMaxTTFTPenaltyMs ÷ 1000; 0: never break it"),
        Param("epsilon", 0.0, 0.5, 0.01, off=0.005, doc="epsilonExploreSticky and epsilonExploreNeg; 0: never"),
        Param("seed", 0, 2**31 - 1, 0, integer=True, doc="of its own random numbers"),
        *ROUTER_PARAMS,
    ),
    arrange=router_layout("llmd_latency"),
)
