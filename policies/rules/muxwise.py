"""MuxWise: prefill and decode share every GPU on disjoint SMs, decode gets as few as its token target needs.

    s    = the smallest decode share with T_decode(D, s) · guard ≤ headroom · TBT_SLO      (D: decode batch)
    N_PL = ceil(T_decode(D, s) · guard · N_layers / T_prefill(P, total − s))

At each decode step boundary the core chooses s and launches decode, beside it N_PL layers of the prefill batch P
(first come first served, whole prompts); with nothing to decode, P runs on all SMs. The largest partial share
serves where none qualifies (inferred). This rule only arranges instances for it and spreads requests: the
paper has one instance, so the dispatch is inferred. With ``preempt=on`` P stands aside at a layer boundary for a
prompt that would be late behind it, meets its TTFT target now, and leaves P's within reach
(``engine.core.schedule.layer_preemption``). Layer boundaries exist beside decode only: with nothing to decode, all
layers of P are one launch here.
"""

from __future__ import annotations

from engine.core.columns import Col, Kind, Need
from engine.core.kinds import Batching, Role
from engine.core.policy import POLICY_SIGNATURE, InstancePlan
from engine.errors import SlalomError
from engine.jit.kernel import kernel
from policies.common import default_answer, kind_of, least, or_hold
from policies.rule import Param, Rule, Values
from policies.setting import Setting

ROUTER = Param("router", default="ttft", choices=("ttft", "tokens"), doc="what dispatch minimises (inferred)")


def require_shares(setting: Setting, rule: str) -> None:
    """Refuse a setting in which some instance's profile knows the whole device only.

    :raises SlalomError: names the first such instance
    """
    for i, row in enumerate(setting.profile_of):
        if int(setting.profile["n_shares"][row]) < 2:
            fix = "its profile has no SM shares; choose one that has (e.g. llama-8b-a100) or another rule"
            raise SlalomError(f"{rule}: instance", i, fix)


@kernel
def route(context, candidates, mask, router):
    """Row for a prompt: least predicted TTFT (router 0) or fewest outstanding tokens (1); HOLD if none may."""
    choice = least(candidates, mask, Col.TTFT_S if router == 0.0 else Col.OUTSTANDING)
    return or_hold(choice, candidates, mask)


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: router, then static ones. TUNE keeps the core's choice of the split, whoever makes it: predictor,
    table (``pdmux_table``) or need (``duetserve``)."""
    if kind_of(context) != Kind.PLACE_PREFILL:
        return default_answer(context, candidates, mask)
    return route(context, candidates, mask, params[0])


def _arrange(values: Values, setting: Setting) -> list[InstancePlan]:
    require_shares(setting, "muxwise")
    plan = InstancePlan(
        role=Role.MULTIPLEXED,
        batching=Batching.LAYERED,
        split=-1,
        headroom=float(values["headroom"]),
        prefill_tokens=int(values["prefill_tokens"]),
        stand_aside=values["preempt"] == "on",
        order=0,
    )
    return [plan] * setting.n_instances


RULE = Rule(
    name="muxwise",
    doc="all instances multiplexed: decode on the fewest SMs that hold its target, layers of prefill on the rest",
    source="MuxWise (ASPLOS 2026, doi 10.1145/3779212.3790236; Drift, arXiv 2504.14489), estimator and dispatcher",
    decide=decide,
    needs=Need.LOAD | Need.PREDICT,
    params=(
        ROUTER,
        Param("headroom", 0.3, 1.5, 1.0, doc="part of the TPOT target that the worst case may use; 1 as published"),
        Param("prefill_tokens", 256, 32768, 8192, log=True, integer=True, doc="tokens of one prefill batch"),
        Param("preempt", default="off", choices=("off", "on"), doc="short prompts preempt a prefill between layers"),
    ),
    arrange=_arrange,
)
