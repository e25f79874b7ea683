"""Arrow: stateless instances in elastic pools; an instance is flipped on live TTFT and TPOT signals.

    prefill: the instance of the prefill pool with the least predicted TTFT
    decode:  the least loaded instance of the decode pool
    flip decode → prefill when TTFT is at risk and TPOT is not;
         prefill → decode when TPOT is at risk and TTFT is not

Only the idea is public knowledge here, so the signals are inferred: TTFT risk = max(mean TTFT of the
interval, least predicted wait of the prefill pool) ÷ TTFT_SLO; TPOT risk = max(mean TPOT of the interval,
longest decode step now) ÷ TPOT_SLO; ``high`` and ``low`` bound the two risks. Arrow's flips are instant;
here one drains first.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Ctx, Kind, Need
from engine.core.kinds import Role
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.common import default_answer, hold, kind_of, or_hold
from policies.rule import Param, Rule, Setting, Values
from policies.rules.parts.layout import split_layout, split_params
from policies.rules.parts.planner import flip, risks
from policies.rules.parts.pools import least_prefill

_PREFILL, _DECODE = int(Role.PREFILL), int(Role.DECODE)


@kernel
def _reallocate(context, candidates, mask, params, memory):
    memory[0] = max(memory[0] - context[Ctx.WIN_SPAN_S], 0.0)
    ttft, tpot = risks(context, candidates, params[3], params[4], params[5], False)
    row = -1
    if memory[0] == 0.0:
        if ttft > params[0] and tpot < params[1]:
            row = flip(candidates, mask, _DECODE, _PREFILL)
        elif tpot > params[0] and ttft < params[1]:
            row = flip(candidates, mask, _PREFILL, _DECODE)
    if row >= 0:
        memory[0] = params[2]
    return row if row >= 0 else hold(candidates, mask)


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: high, low, cooldown, TTFT target, its factor, TPOT target.

    ``memory[0]``: seconds until the next flip is allowed.
    """
    kind = kind_of(context)
    if kind == Kind.REALLOCATE:
        return _reallocate(context, candidates, mask, params, memory)
    if kind != Kind.PLACE_PREFILL:
        return default_answer(context, candidates, mask)
    return or_hold(least_prefill(candidates, mask, Col.TTFT_S, Col.QUEUE_TOKENS), candidates, mask)


_PARAMS = (
    Param("high", 0.1, 3.0, 0.9, doc="risk from which a side asks for an instance (inferred)"),
    Param("low", 0.1, 3.0, 0.5, doc="risk below which a side can give one (inferred)"),
    Param("cooldown_s", 0.0, 60.0, 5.0, doc="least time between two flips (inferred)"),
)


def _prepare(values: Values, setting: Setting) -> np.ndarray:
    """The parameters and the targets of the class that is tightest in TTFT."""
    tight = min(setting.classes, key=lambda c: (c.ttft_s, c.ttft_factor))
    own = [p.number(values[p.name]) for p in _PARAMS]
    return np.array([*own, tight.ttft_s, tight.ttft_factor, tight.tpot_s])


RULE = Rule(
    name="arrow",
    doc="least predicted TTFT; an instance changes sides when one target is at risk and the other is not",
    source="Arrow (arXiv 2505.11916), elastic instance pools",
    decide=decide,
    needs=Need.LOAD | Need.PREDICT,
    params=(*_PARAMS, *split_params()),
    prepare=_prepare,
    arrange=split_layout("arrow"),
)
