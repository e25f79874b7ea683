"""DuetServe: fused steps on the whole GPU, prefill and decode on disjoint SMs only while a step would be late.

    T_fused(P, D) ≤ headroom · TBT_SLO:   one fused step on all SMs (chunked prefill)
    else over the splits s with  T_decode(D, s) · guard ≤ headroom · TBT_SLO  the one of most tokens per second:
        max_s (n_P + k · |D|) / max(T_prefill(P, total − s), k · T_decode(D, s)),
        k = max(1, floor(T_prefill / T_decode))

The core decides at every step boundary (``Split.ON_DEMAND``): while the chunk of P runs, decode takes the k
steps beside it that end first (the paper's look-ahead decode); then both lanes meet again. This rule
arranges instances for it and spreads requests. From the abstract: aggregated by default, split when TBT
degradation is predicted, split of most throughput under the TBT bound. Inferred: the formula of throughput, the
guard, the largest decode share where no split qualifies, predictions from the latency profile instead of the
paper's attention-aware roofline, and the dispatch over instances (the paper has one).
"""

from __future__ import annotations

from engine.core.columns import Need
from engine.core.kinds import Batching, Order, Role, Split
from engine.core.policy import InstancePlan
from policies.rule import Param, Rule, Values
from policies.rules.muxwise import ROUTER, decide, require_shares
from policies.setting import Setting


def _arrange(values: Values, setting: Setting) -> list[InstancePlan]:
    require_shares(setting, "duetserve")
    plan = InstancePlan(
        role=Role.MULTIPLEXED,
        batching=Batching.CHUNKED,
        split=Split.ON_DEMAND,
        headroom=float(values["headroom"]),
        chunk_tokens=int(values["chunk_tokens"]),
        order=Order.FCFS,
    )
    return [plan] * setting.n_instances


RULE = Rule(
    name="duetserve",
    doc="chunked prefill on all SMs, split into two lanes only for steps that would miss the token target",
    source="DuetServe (arXiv 2511.04791), abstract: adaptive SM multiplexing, partitioning optimiser",
    decide=decide,
    needs=Need.LOAD | Need.PREDICT,
    params=(
        ROUTER,
        Param("headroom", 0.3, 1.5, 1.0, doc="part of the TPOT target that a step may use; 1 as published"),
        Param("chunk_tokens", 128, 16384, 8192, log=True, integer=True, doc="token budget of a step (inferred)"),
    ),
    arrange=_arrange,
)
