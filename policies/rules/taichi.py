"""TaiChi: every instance runs chunked prefill; P-heavy ones with large chunks, D-heavy ones with small ones.

Sliders: R_PD (share of P-heavy instances), S_P and S_D (their chunk budgets). S_P = S_D is plain
aggregation, a tiny S_D approaches disaggregation.

    prefill (length-aware): est_i = queue + execution + KV transfer;  feasible = {i: est_i ≤ TTFT_SLO}
        short prompts prefer feasible D-heavy instances; fewest queued prefill tokens within the set;
        nothing feasible → least est
    decode (flowing): start on a D-heavy instance; above 95 % of its memory a decode moves to P-heavy

Not reproduced: moving a decode that already runs (no decision re-places it), so memory pressure is
answered when a prefill ends: it starts on P-heavy while every D-heavy instance is over the watermark
(inferred), and the way back at 0.96 · TPOT_SLO does not exist. Inferred: which prompts are short;
preference of long ones for P-heavy; the transfer counts as nothing in est, because no column tells it
before the prefill.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Ctx, Kind, Need
from engine.core.kinds import Batching, Role
from engine.core.policy import POLICY_SIGNATURE, InstancePlan
from engine.jit.kernel import kernel
from policies.common import default_answer, is_instance, kind_of, least, or_hold
from policies.rule import Param, Rule, Setting, Values
from policies.rules.parts.pools import kv_use, tokens


@kernel
def _heavy_in_prefill(candidates, k, s_p, s_d):
    return s_p > s_d and candidates[k, Col.CHUNK_TOKENS] >= s_p


@kernel
def _feasible(context, candidates, mask, prefill_heavy, params):
    """The feasible instance of one kind with the fewest queued prefill tokens, -1 if none."""
    best, queued = -1, np.inf
    for k in range(candidates.shape[0]):
        if not is_instance(candidates, mask, k) or candidates[k, Col.TTFT_S] > context[Ctx.TTFT_SLO_S]:
            continue
        if _heavy_in_prefill(candidates, k, params[0], params[1]) == prefill_heavy:
            if candidates[k, Col.QUEUE_TOKENS] < queued:
                best, queued = k, candidates[k, Col.QUEUE_TOKENS]
    return best


@kernel
def _place_prefill(context, candidates, mask, params):
    long = context[Ctx.PROMPT] > params[2] * max(context[Ctx.MEAN_PROMPT], 1.0)
    choice = _feasible(context, candidates, mask, long, params)
    if choice < 0:
        choice = _feasible(context, candidates, mask, not long, params)
    return choice if choice >= 0 else least(candidates, mask, Col.TTFT_S)


@kernel
def _place_decode(context, candidates, mask, params):
    """Stay on D-heavy; else the D-heavy instance below the watermark with the least context; -1 if none."""
    best, load = -1, np.inf
    for k in range(candidates.shape[0]):
        if not is_instance(candidates, mask, k) or _heavy_in_prefill(candidates, k, params[0], params[1]):
            continue
        if kv_use(candidates, k) > params[3]:
            continue
        if candidates[k, Col.INSTANCE] == context[Ctx.SOURCE]:
            return k
        if tokens(candidates, k) < load:
            best, load = k, tokens(candidates, k)
    return best


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: S_P, S_D, short ÷ mean prompt, watermark."""
    kind = kind_of(context)
    choice = -1
    if kind == Kind.PLACE_PREFILL:
        choice = _place_prefill(context, candidates, mask, params)
    elif kind == Kind.PLACE_DECODE:
        choice = _place_decode(context, candidates, mask, params)
    return choice if choice >= 0 else or_hold(default_answer(context, candidates, mask), candidates, mask)


def _arrange(values: Values, setting: Setting) -> list[InstancePlan]:
    n = setting.n_instances
    n_heavy = min(max(round(float(values["r_pd"]) * n), 1), max(n - 1, 1))
    budgets = [int(values["s_p"])] * n_heavy + [int(values["s_d"])] * (n - n_heavy)
    return [InstancePlan(role=Role.MIXED, chunk_tokens=b, batching=Batching.CHUNKED) for b in budgets]


RULE = Rule(
    name="taichi",
    doc="chunked prefill everywhere, large chunks on some instances and small ones on the others",
    source="TaiChi (arXiv 2508.01989), flowing decode and length-aware prefill scheduling",
    decide=decide,
    needs=Need.LOAD | Need.PREDICT,
    params=(
        Param("s_p", 128, 8192, 1024, log=True, integer=True, doc="S_P: chunk tokens of P-heavy instances"),
        Param("s_d", 32, 2048, 256, log=True, integer=True, doc="S_D: chunk tokens of D-heavy instances"),
        Param("short", 0.1, 10.0, 1.0, log=True, doc="prompts up to this many means are short (inferred)"),
        Param("watermark", 0.5, 1.0, 0.95, doc="KV use above which a D-heavy instance starts no decode"),
        Param("r_pd", 0.0, 1.0, 0.5, doc="R_PD: share of P-heavy instances"),
    ),
    arrange=_arrange,
)
