"""Power of two choices: draw two allowed instances at random, take the one with fewer outstanding tokens."""

from __future__ import annotations

from engine.core.columns import Col, Kind, Need
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.common import default_answer, kind_of, only_decoders, or_hold, takes_prompts
from policies.rule import Rule
from policies.rules.parts.draws import uniform


@kernel
def _nth_instance(candidates, mask, n, everyone):
    for k in range(candidates.shape[0]):
        if takes_prompts(candidates, mask, k, everyone):
            if n == 0:
                return k
            n -= 1
    return -1


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """The second draw never repeats the first."""
    if kind_of(context) != Kind.PLACE_PREFILL:
        return default_answer(context, candidates, mask)
    everyone = only_decoders(candidates, mask)
    allowed = 0
    for k in range(candidates.shape[0]):
        if takes_prompts(candidates, mask, k, everyone):
            allowed += 1
    if allowed < 2:
        return or_hold(_nth_instance(candidates, mask, 0, everyone), candidates, mask)
    first = int(uniform(memory, 0, 0) * allowed)
    second = (first + 1 + int(uniform(memory, 0, 0) * (allowed - 1))) % allowed
    a = _nth_instance(candidates, mask, first, everyone)
    b = _nth_instance(candidates, mask, second, everyone)
    return a if candidates[a, Col.OUTSTANDING] <= candidates[b, Col.OUTSTANDING] else b


RULE = Rule(
    name="power_of_two",
    doc="the less loaded of two instances drawn at random",
    source="Mitzenmacher, The power of two choices in randomized load balancing (IEEE TPDS 2001)",
    decide=decide,
    needs=Need.LOAD,
)
