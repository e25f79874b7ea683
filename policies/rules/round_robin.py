"""Round robin: instances take prompts in turn; the next allowed instance after the last one used."""

from __future__ import annotations

from engine.core.columns import Col, Kind, Need
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.common import default_answer, kind_of, only_decoders, or_hold, takes_prompts
from policies.rule import Rule


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``memory[0]`` holds 1 + the instance used last, so zero means "start at instance 0"."""
    if kind_of(context) != Kind.PLACE_PREFILL:
        return default_answer(context, candidates, mask)
    turn = memory[0]
    following, first = -1, -1
    everyone = only_decoders(candidates, mask)
    for k in range(candidates.shape[0]):
        if not takes_prompts(candidates, mask, k, everyone):
            continue
        instance = candidates[k, Col.INSTANCE]
        if first < 0 or instance < candidates[first, Col.INSTANCE]:
            first = k
        if instance >= turn and (following < 0 or instance < candidates[following, Col.INSTANCE]):
            following = k
    choice = following if following >= 0 else first
    if choice >= 0:
        memory[0] = candidates[choice, Col.INSTANCE] + 1.0
    return or_hold(choice, candidates, mask)


RULE = Rule(
    name="round_robin",
    doc="instances take prompts in turn",
    source="common practice",
    decide=decide,
    needs=Need.LOAD,
)
