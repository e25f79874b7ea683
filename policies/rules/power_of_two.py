"""Power of two choices: draw two allowed instances at random, take the one with fewer outstanding tokens."""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Kind, Need
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.common import default_answer, kind_of, only_decoders, or_hold, takes_prompts
from policies.rule import Rule

_MASK32 = 0xFFFFFFFF


@kernel
def _random(memory):
    """Next number in [0, 1) of a 32-bit xorshift (Marsaglia 2003); its state is ``memory[0]``, 0 = just reset.

    32 bits, because a float64 cell holds them exactly.
    """
    state = np.int64(memory[0])
    if state == 0:
        state = np.int64(88675123)
    state ^= (state << 13) & _MASK32
    state ^= state >> 17
    state ^= (state << 5) & _MASK32
    memory[0] = float(state)
    return state / 4294967296.0


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
    first = int(_random(memory) * allowed)
    second = (first + 1 + int(_random(memory) * (allowed - 1))) % allowed
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
