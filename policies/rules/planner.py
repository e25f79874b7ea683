"""A controller of roles with its own clock: it weighs what prefill and decode need, and commits to a composition.

Every control tick, over control windows with averages of two speeds (``window_s`` and ``slow`` times that):

    u   = rate · TTFT_prof(prompt)                              instances that arriving prompts keep busy
    q   = queued prompt tokens · TTFT_prof(prompt) / prompt     seconds of prefill that wait
    occ = Σ running and inbound sequences / b                   instances that decodes fill now,
                                                                b = the largest batch within headroom · TPOT target
    lit = rate · output · ITL_prof(b) / b                       instances that they will fill, by Little's law

    P = prefill · (u_fast + trend · (u_fast − u_slow)) + backlog · q / TTFT_SLO
        + ttft_risk · max(0, TTFT / TTFT_SLO − 1)
    D = decode · max(occ + lead · (lit − occ), occ_share · occ) + tpot_risk · max(0, TPOT / TPOT_SLO − 1)

Every ``interval_s``, unless committed: N_P is wanted where P + D fill the fleet of N, N · P / (P + D), or P and a share
``spare`` of what is left. The composition changes when that is more than ½ + ``hysteresis`` away from it, and then not
again for ``commit_s``. What demand says is corrected by what is seen (``by``): with the risks

    r_P = max(TTFT of the last window, least predicted wait) / TTFT_SLO
    r_D = max(TPOT of the last window, longest decode step) / TPOT_SLO

prefill gets one instance more than it has where r_P > ``high`` and r_D < ``low``, and one less where r_D > ``high`` and
r_P < ``low``. One instance a tick begins to move, the one with the least to hand over or to place anew. The others take
``side``: decode only, or both phases (multiplexed or mixed), where nobody has to prefill only.

DYN-SLA's equations are prefill = decode = lead = 1 with everything else 0, by needs; Arrow is by risks alone. By
nothing the composition of the start stays, which is best where one suits every hour.
Prompts and decodes are placed by ``linear_score``: the weights named in ``PLACING`` are parameters here too, the
others have their defaults.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.core.columns import Col, Ctx, Kind, Need
from engine.core.kinds import Batching, Order, Role
from engine.core.policy import POLICY_SIGNATURE
from engine.errors import SlalomError
from engine.jit.kernel import kernel
from policies.common import default_answer, kind_of
from policies.network.features import N_FEATURES
from policies.rule import InstancePlan, Param, Rule, Setting, Values
from policies.rules import linear_score
from policies.rules.parts.planner import composition, corrected, count_prefill, risks, toward
from policies.rules.parts.profile_tables import (
    itl_prof,
    largest_batch,
    profile_block,
    tpot_slo,
    ttft_prof,
)

_PREFILL, _DECODE = int(Role.PREFILL), int(Role.DECODE)
_DISPATCH = len(Kind) * N_FEATURES  # params: the score's weights come first
_PLACE_DECODE = int(Kind.PLACE_DECODE) * N_FEATURES
(_INTERVAL, _WINDOW, _SLOW, _TREND, _P_GAIN, _D_GAIN, _BACKLOG, _LEAD, _OCC_SHARE, _HEADROOM, _TTFT_RISK, _TPOT_RISK,
 _SPARE, _HYSTERESIS, _COMMIT, _HIGH, _LOW, _PACK, _SIDE, _BY, _TTFT_S, _TTFT_FACTOR) = range(
    _DISPATCH, _DISPATCH + 22)  # fmt: skip
_TABLES = _DISPATCH + 22
_BY_NEEDS, _BY_RISKS, _BY_BOTH, _BY_NOTHING = range(4)
#: Memory: averages (prefill load fast and slow, prompt, rate, output, TTFT, TPOT), seconds seen, the clock, seconds for
#: which the composition holds still, 1 + the prefill instances wanted (0: nobody has looked yet).
_U, _U_SLOW, _PROMPT, _RATE, _OUTPUT, _TTFT, _TPOT, _SEEN, _CLOCK, _COMMITTED, _PLAN = range(11)
_CELLS = _PLAN + 1


@kernel
def _blend(memory, cell, value, weight):
    memory[cell] += weight * (value - memory[cell])


@kernel
def _observe(context, params, memory):
    """Take in the last control window; averages start as means of what was seen so far."""
    span, rate, prompt = context[Ctx.WIN_SPAN_S], context[Ctx.WIN_RATE], context[Ctx.WIN_PROMPT]
    first = memory[_SEEN] == 0.0
    memory[_SEEN] += span
    fast = max(1.0 - np.exp(-span / params[_WINDOW]), min(span / memory[_SEEN], 1.0))
    slow = max(1.0 - np.exp(-span / (params[_WINDOW] * params[_SLOW])), min(span / memory[_SEEN], 1.0))
    load = rate * ttft_prof(params, _TABLES, prompt) if prompt > 0.0 else 0.0
    _blend(memory, _U, load, fast)
    _blend(memory, _U_SLOW, load, slow)
    _blend(memory, _RATE, rate, fast)
    _blend(memory, _TTFT, context[Ctx.WIN_TTFT_S], fast)
    if prompt > 0.0:
        _blend(memory, _PROMPT, prompt, 1.0 if first else fast)
    if context[Ctx.WIN_OUTPUT] > 0.0:
        unknown = memory[_OUTPUT] == 0.0
        _blend(memory, _OUTPUT, context[Ctx.WIN_OUTPUT], 1.0 if unknown else fast)
        _blend(memory, _TPOT, context[Ctx.WIN_TPOT_S], 1.0 if unknown else fast)


@kernel
def _loads(candidates):
    """(queued prompt tokens, sequences that decode or come to, their context tokens) of the fleet."""
    queued, seats, tokens = 0.0, 0.0, 0.0
    for k in range(candidates.shape[0]):
        role, new = int(candidates[k, Col.ROLE]), int(candidates[k, Col.NEW_ROLE])
        if candidates[k, Col.INSTANCE] >= 0.0 and new == (1 if role == 0 else 0):  # one row of each instance
            queued += candidates[k, Col.QUEUE_TOKENS]
            seats += candidates[k, Col.RUN_N] + candidates[k, Col.INBOUND_N]
            tokens += candidates[k, Col.RUN_CTX] + candidates[k, Col.INBOUND_TOKENS]
    return queued, seats, tokens


@kernel
def _demand(context, candidates, params, memory):
    """(q, the TTFT limit, occ, lit) of the module docstring."""
    queued, seats, tokens = _loads(candidates)
    prompt = max(memory[_PROMPT], 1.0)
    limit = max(params[_TTFT_S], params[_TTFT_FACTOR] * context[Ctx.ISOLATED_S], 1e-9)
    wait = queued * ttft_prof(params, _TABLES, prompt) / prompt
    mean = tokens / seats if seats > 0.0 else prompt + 0.5 * memory[_OUTPUT]
    batch = largest_batch(params, _TABLES, mean, params[_HEADROOM] * tpot_slo(params, _TABLES))
    coming = memory[_RATE] * memory[_OUTPUT] * itl_prof(params, _TABLES, batch, mean) / batch
    return wait, limit, seats / batch, coming


@kernel
def needs(context, candidates, params, memory):
    """(P, D): instances that each phase needs, see the module docstring."""
    wait, limit, occupied, coming = _demand(context, candidates, params, memory)
    p = params[_P_GAIN] * max(memory[_U] + params[_TREND] * (memory[_U] - memory[_U_SLOW]), 0.0)
    p += params[_BACKLOG] * wait / limit + params[_TTFT_RISK] * max(memory[_TTFT] / limit - 1.0, 0.0)
    d = params[_D_GAIN] * max(occupied + params[_LEAD] * (coming - occupied), params[_OCC_SHARE] * occupied)
    d += params[_TPOT_RISK] * max(memory[_TPOT] / tpot_slo(params, _TABLES) - 1.0, 0.0)
    return p, d


@kernel
def _seen(context, candidates, params):
    """(r_P, r_D): how near each target is to being missed now, see the module docstring."""
    return risks(context, candidates, params[_TTFT_S], params[_TTFT_FACTOR], tpot_slo(params, _TABLES), True)


@kernel
def _least(params):
    """Instances that must prefill only."""
    return 1.0 if int(params[_SIDE]) == _DECODE else 0.0


@kernel
def _wanted(context, candidates, params, memory, now):
    """Prefill instances by needs, by risks, or by needs corrected by risks."""
    wanted, n, by = now, context[Ctx.N_INSTANCES], int(params[_BY])
    least = _least(params)
    if by != _BY_RISKS:
        p, d = needs(context, candidates, params, memory)
        wanted = composition(p, d, n, now, params[_SPARE], params[_HYSTERESIS], least)
    if by != _BY_NEEDS:
        ttft, tpot = _seen(context, candidates, params)
        wanted = corrected(wanted, now, ttft, tpot, params[_HIGH], params[_LOW], least, n - 1.0)
    return wanted


@kernel
def _reallocate(context, candidates, mask, params, memory):
    if int(params[_BY]) == _BY_NOTHING:
        return default_answer(context, candidates, mask)
    span = context[Ctx.WIN_SPAN_S]
    _observe(context, params, memory)
    memory[_CLOCK] += span
    memory[_COMMITTED] = max(memory[_COMMITTED] - span, 0.0)
    if memory[_PLAN] == 0.0:
        memory[_PLAN] = 1.0 + float(count_prefill(candidates))
    target = memory[_PLAN] - 1.0
    if memory[_CLOCK] >= params[_INTERVAL] * (1.0 - 1e-6) and memory[_COMMITTED] == 0.0:
        memory[_CLOCK] = 0.0
        wanted = _wanted(context, candidates, params, memory, target)
        if wanted != target:
            memory[_PLAN], memory[_COMMITTED], target = 1.0 + wanted, params[_COMMIT], wanted
    target = min(max(target, _least(params)), context[Ctx.N_INSTANCES] - 1.0)
    return toward(candidates, mask, target, int(params[_SIDE]))


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: weights of the score, the rule's own in declared order, TTFT target and factor, profile tables."""
    if kind_of(context) == Kind.REALLOCATE:
        return _reallocate(context, candidates, mask, params, memory)
    if kind_of(context) == Kind.PLACE_DECODE and context[Ctx.GENERATED] > 1.0:
        return linear_score.cheapest(candidates, mask, params, _PLACE_DECODE, Col.STEP_WITH, -params[_PACK])
    return linear_score.decide(context, candidates, mask, params, memory)


_SIDES = ("decode", "multiplexed", "mixed")
_BYS = ("needs", "risks", "both", "nothing")
_MOVING = (("by", ("needs", "risks", "both")),)
_NEEDS = (("by", ("needs", "both")),)
_RISKS = (("by", ("risks", "both")),)
_BESIDE = (("side", ("mixed", "multiplexed")),)
_LAYERED = (("side", ("multiplexed",)),)
_PARAMS = (
    Param("interval_s", 1.0, 60.0, 2.0, log=True, doc="time between two looks at the composition", when=_MOVING),
    Param("window_s", 2.0, 300.0, 10.0, log=True, doc="time constant of the fast averages", when=_NEEDS),
    Param("slow", 1.5, 20.0, 4.0, log=True, doc="that of the slow ones, as a multiple", when=_NEEDS),
    Param("trend", 0.0, 3.0, 0.0, doc="how far the move of the prefill load is carried on", when=_NEEDS),
    Param("prefill", 0.0, 4.0, 1.3, doc="instances for each that arriving prompts keep busy", when=_NEEDS),
    Param("decode", 0.0, 4.0, 1.1, doc="instances for each that decodes fill", when=_NEEDS),
    Param("backlog", 0.0, 2.0, 0.2, doc="instances for each TTFT target of queued prefill", when=_NEEDS),
    Param("lead", 0.0, 1.5, 0.5, doc="0: decodes as they are; 1: as they will be by Little's law", when=_NEEDS),
    Param(
        "occ_share", 0.0, 1.0, 0.3, doc="share of the decodes there are that counts whatever is to come", when=_NEEDS
    ),
    Param("headroom", 0.3, 1.2, 0.9, doc="part of the TPOT target that a batch may take", when=_NEEDS),
    Param("ttft_risk", 0.0, 4.0, 0.3, doc="instances for each TTFT target of mean TTFT beyond the target", when=_NEEDS),
    Param("tpot_risk", 0.0, 4.0, 0.3, doc="instances for each TPOT target of mean TPOT beyond the target", when=_NEEDS),
    Param("spare", 0.0, 1.0, 0.5, doc="share for prefill of the instances that nobody needs", when=_NEEDS),
    Param("hysteresis", 0.0, 1.5, 0.2, doc="instances by which a composition must be off, beyond a half", when=_NEEDS),
    Param("commit_s", 0.0, 300.0, 10.0, doc="time that a composition holds at least", when=_MOVING),
    Param("high", 0.1, 3.0, 0.9, doc="risk from which a phase asks for an instance", when=_RISKS),
    Param("low", 0.1, 3.0, 1.0, doc="risk below which a phase can give one", when=_RISKS),
    Param("pack", 0.0, 8.0, 4.0, doc="how much decodes handed over prefer slow steps, leaving others to new ones"),
    Param("side", default="decode", choices=_SIDES, doc="role of the instances that do not prefill only"),
    Param("by", default="needs", choices=_BYS, doc="what moves instances: demand, targets at risk, both, or nothing"),
)
#: Weights of ``linear_score`` that matter where instances of several roles may take a prompt.
PLACING = (
    "p_late", "p_queue_work", "p_slack_miss", "p_step_miss", "p_decode_role", "p_mixed_role", "p_multiplexed_role",
    "d_in_place", "d_step_miss", "d_queue_work",
)  # fmt: skip
_WHERE = {"p_decode_role": ("decode",), "p_mixed_role": ("mixed",), "p_multiplexed_role": ("multiplexed",)}
_PLACED = tuple(
    replace(p, when=(("side", _WHERE[p.name]),) if p.name in _WHERE else ())
    for p in linear_score.RULE.params
    if p.name in PLACING
)
_LAYOUT = (
    Param("start", 0.0, 1.0, 0.5, doc="share of instances that start as prefill"),
    Param("prefill_tokens", 256, 16384, 8192, log=True, integer=True, doc="token budget of a prefill batch"),
    Param("chunk_tokens", 64, 8192, 512, log=True, integer=True, doc="step budget of mixed instances", when=_BESIDE),
    Param("guard", 0.5, 1.5, 1.0, doc="part of the TPOT target that decode may take beside prefill", when=_LAYERED),
    Param("order", default="on_time", choices=("fcfs", "on_time"), doc="of the prefill queues"),
)
_ORDERS = {"fcfs": Order.FCFS, "on_time": Order.ON_TIME}


def _prepare(values: Values, setting: Setting) -> np.ndarray:
    """The score's defaults, the values, the targets of the class that is tightest in TTFT, the profile's tables.

    :raises SlalomError: nobody asks for role changes, or there is one instance only
    """
    if Kind.REALLOCATE not in setting.kinds:
        raise SlalomError(
            "planner: decisions.reallocate", False, "it plans role changes; allow them, or choose another"
        )
    if setting.n_instances < 2:
        raise SlalomError("planner: instances", setting.n_instances, "it needs two or more")
    tight = min(setting.classes, key=lambda c: (c.ttft_s, c.ttft_factor))
    own = [p.number(values[p.name]) for p in _PARAMS if p.choices is None]
    kinds = [float(Role[str(values["side"]).upper()]), float(_BYS.index(str(values["by"])))]
    targets = [tight.ttft_s, tight.ttft_factor]
    return np.concatenate([weights_of(values), own, kinds, targets, profile_block(setting)])


def weights_of(values: Values) -> np.ndarray:
    """Weights of the score by which prompts and decodes are placed, flat."""
    return linear_score.weights(linear_score.RULE.values({name: values[name] for name in PLACING})).ravel()


def least_prefill(values: Values) -> int:
    """Instances that must prefill only: none where the others prefill as well."""
    return 1 if values["side"] == "decode" else 0


def plans_of(values: Values, prefill: int, n: int) -> list[InstancePlan]:
    """``prefill`` instances that prefill only and ``n - prefill`` of the other role, with the budgets of ``values``."""
    side = Role[str(values["side"]).upper()]
    plan = InstancePlan(
        prefill_tokens=int(values["prefill_tokens"]),
        chunk_tokens=int(values["chunk_tokens"]),
        headroom=float(values["guard"]),
        order=int(_ORDERS[str(values["order"])]),
    )
    rest = replace(plan, role=side, batching=Batching.LAYERED if side == Role.MULTIPLEXED else None)
    return [replace(plan, role=Role.PREFILL)] * prefill + [rest] * (n - prefill)


def _arrange(values: Values, setting: Setting) -> list[InstancePlan]:
    n, least = setting.n_instances, least_prefill(values)
    return plans_of(values, min(max(round(float(values["start"]) * n), least), n - 1), n)


RULE = Rule(
    name="planner",
    doc="a composition of roles from what prefill and decode need, with hysteresis and commitment",
    source="this project; DYN-SLA's equations and Arrow's signals (arXiv 2511.20982, 2505.11916) are special cases",
    decide=decide,
    needs=Need.LOAD | Need.PREDICT | Need.DIMENSIONLESS,
    memory_size=_CELLS,
    params=(*_PARAMS, *_LAYOUT, *_PLACED),
    prepare=_prepare,
    arrange=_arrange,
)
