"""Least tokens: send a prompt to the instance with the fewest tokens outstanding.

Outstanding = prompt tokens still to compute + context of the running set + tokens on their way. The usual
default of data-parallel LLM routers.
"""

from __future__ import annotations

from engine.core.columns import Need
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.common import default_answer
from policies.rule import Rule


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """Fewest ``OUTSTANDING`` tokens; ties to the lowest row."""
    return default_answer(context, candidates, mask)


RULE = Rule(
    name="least_tokens",
    doc="fewest outstanding tokens",
    source="common practice (join the shortest queue, counted in tokens)",
    decide=decide,
    needs=Need.LOAD,
)
