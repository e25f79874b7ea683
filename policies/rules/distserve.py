"""DistServe: prefill and decode on separate instances with a fixed split.

    arrival          → the prefill instance with the shortest queue
    prefill batch    = first come first served up to L_m new tokens; a prompt longer than L_m runs alone
    prefill finished → the least loaded decode instance, which pulls the KV when it has room

(OSDI 2024, section 4.) Least loaded means the shortest decode step with the request added (inferred; the
paper does not say in what load is counted). The queue is counted in requests as in the authors' simulator,
ties by tokens; ``queue=tokens`` is an ablation. Queued prompts stay where they were put, so a long prompt
delays those behind it (FCFS convoy, acknowledged in the paper).
"""

from __future__ import annotations

from engine.core.columns import Col, Kind, Need
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.common import default_answer, kind_of, or_hold
from policies.rule import Param, Rule
from policies.rules.parts.layout import split_layout, split_params
from policies.rules.parts.pools import least_prefill


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: 0 shortest by requests, 1 by tokens."""
    if kind_of(context) != Kind.PLACE_PREFILL:
        return default_answer(context, candidates, mask)
    if params[0] == 0.0:
        choice = least_prefill(candidates, mask, Col.QUEUE_N, Col.QUEUE_TOKENS)
    else:
        choice = least_prefill(candidates, mask, Col.QUEUE_TOKENS, Col.QUEUE_N)
    return or_hold(choice, candidates, mask)


RULE = Rule(
    name="distserve",
    doc="fixed prefill/decode split: shortest prefill queue, least loaded decode, KV pulled",
    source="DistServe (Zhong et al., OSDI 2024, arXiv 2401.09670), section 4",
    decide=decide,
    needs=Need.LOAD | Need.PREDICT,
    params=(
        Param("queue", default="requests", choices=("requests", "tokens"), doc="how a queue is counted"),
        *split_params(),
    ),
    arrange=split_layout("distserve"),
)
