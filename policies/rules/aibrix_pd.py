"""AIBrix PD router: prefill pods, decode pods, and combined pods that serve short prompts and take the
overflow.

    bucketing: a prompt of at most ``bucket_tokens`` → the combined pod with the fewest requests (0: off)
    overload:  every prefill pod has ``overload`` requests or more and a combined pod is idle → that one
    imbalance: requests over prefill pods differ by more than ``prefill_spread`` → the least loaded
    else:      longest cached prefix, ties by fewest requests (or fewest requests alone)
    decode:    requests differ by ``decode_spread`` or more → fewest requests; else the shortest decode step

Spreads and score policies are AIBrix's names and defaults (16, prefix_cache); bucketing is off there by
default. Inferred: the overload count, the decode score (AIBrix weighs running requests and throughput),
how many pods are combined. A combined pod is a MIXED instance.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Ctx, Kind, Need
from engine.core.kinds import Batching, Role
from engine.core.policy import POLICY_SIGNATURE, InstancePlan
from engine.jit.kernel import kernel
from policies.arrangement import prefill_decode_split
from policies.common import default_answer, is_instance, kind_of, least, least_decode, or_hold, stay_in_place
from policies.rule import Param, Rule, Setting, Values
from policies.rules.parts.pools import requests

_PREFILL, _DECODE, _MIXED = int(Role.PREFILL), int(Role.DECODE), int(Role.MIXED)


@kernel
def _fewest(candidates, mask, role):
    """(row with the fewest requests among pods of ``role``, its count, the greatest count); row -1: none."""
    best, low, high = -1, np.inf, -np.inf
    for k in range(candidates.shape[0]):
        if is_instance(candidates, mask, k) and int(candidates[k, Col.ROLE]) == role:
            here = requests(candidates, k)
            high = max(high, here)
            if here < low:
                best, low = k, here
    return best, low, high


@kernel
def _longest_prefix(candidates, mask):
    best, cached, load = -1, -1.0, np.inf
    for k in range(candidates.shape[0]):
        if is_instance(candidates, mask, k) and int(candidates[k, Col.ROLE]) == _PREFILL:
            hit, here = candidates[k, Col.CACHED_TOKENS], requests(candidates, k)
            if hit > cached or (hit == cached and here < load):
                best, cached, load = k, hit, here
    return best


@kernel
def _place_prefill(context, candidates, mask, params):
    combined, idle, _ = _fewest(candidates, mask, _MIXED)
    prefill, low, high = _fewest(candidates, mask, _PREFILL)
    if combined >= 0 and (prefill < 0 or context[Ctx.PROMPT] <= params[0]):
        return combined
    if prefill < 0:
        return least(candidates, mask, Col.OUTSTANDING)
    if combined >= 0 and idle == 0.0 and low >= params[1]:
        return combined
    if high - low > params[2] or params[4] == 1.0:
        return prefill
    return _longest_prefix(candidates, mask)


@kernel
def _place_decode(context, candidates, mask, params):
    stay = stay_in_place(context, candidates, mask)
    if stay >= 0:
        return stay
    fewest, low, high = _fewest(candidates, mask, _DECODE)
    return fewest if fewest >= 0 and high - low >= params[3] else least_decode(candidates, mask)


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: bucket, overload, prefill spread, decode spread, score (0 prefix, 1 least_request)."""
    kind = kind_of(context)
    if kind == Kind.PLACE_PREFILL:
        return or_hold(_place_prefill(context, candidates, mask, params), candidates, mask)
    if kind == Kind.PLACE_DECODE:
        return or_hold(_place_decode(context, candidates, mask, params), candidates, mask)
    return default_answer(context, candidates, mask)


def _arrange(values: Values, setting: Setting) -> list[InstancePlan] | None:
    if values["layout"] == "scenario":
        return None
    n = setting.n_instances
    n_combined = min(max(round(float(values["combined_fraction"]) * n), 0), n)
    budget = int(values["chunk_tokens"])
    combined = InstancePlan(role=Role.MIXED, chunk_tokens=budget, batching=Batching.CHUNKED)
    if n - n_combined < 2:
        return [combined] * n
    pairs = prefill_decode_split(setting, float(values["prefill_fraction"]), 2048, "aibrix_pd")
    n_prefill = min(max(round(float(values["prefill_fraction"]) * (n - n_combined)), 1), n - n_combined - 1)
    return [pairs[0]] * n_prefill + [pairs[-1]] * (n - n_combined - n_prefill) + [combined] * n_combined


RULE = Rule(
    name="aibrix_pd",
    doc="prefill and decode pods with combined pods as safety valve, imbalance thresholds, prefix score",
    source="AIBrix gateway, pd_disaggregation.go (AIBRIX_PREFILL_LOAD_IMBALANCE_MIN_SPREAD and others)",
    decide=decide,
    needs=Need.LOAD | Need.PREDICT,
    params=(
        Param("bucket_tokens", 0, 16384, 0, integer=True, doc="prompts up to here go to combined pods; 0: off"),
        Param(
            "overload",
            1,
            64,
            2,
            integer=True,
            doc="requests on every prefill pod that mean overload (inferred)",
        ),
        Param("prefill_spread", 0, 256, 16, integer=True, doc="requests by which prefill pods may differ"),
        Param("decode_spread", 0, 256, 16, integer=True, doc="requests by which decode pods may differ"),
        Param(
            "score",
            default="prefix_cache",
            choices=("prefix_cache", "least_request"),
            doc="prefill score policy",
        ),
        Param("layout", default="scenario", choices=("scenario", "pods"), doc="the scenario's, or by fractions"),
        Param("combined_fraction", 0.0, 1.0, 0.25, doc="share of combined pods, for layout=pods (inferred)"),
        Param("prefill_fraction", 0.0, 1.0, 0.5, doc="share of the others that prefills"),
        Param("chunk_tokens", 64, 8192, 512, log=True, integer=True, doc="step budget of combined pods"),
    ),
    arrange=_arrange,
)
