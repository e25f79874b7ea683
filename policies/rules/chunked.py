"""Chunked prefill on every instance, behind a router.

Each step spends a token budget: decodes first, then prompt chunks. A large budget favours TTFT, a small one
TPOT; the router spreads prompts over replicas.
"""

from __future__ import annotations

from engine.core.columns import Col, Kind, Need
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.arrangement import all_mixed
from policies.common import default_answer, kind_of, least, or_hold
from policies.rule import Param, Rule


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: chunk tokens (static), router index. Router 0 fewest outstanding tokens, 1 shortest queue,
    2 least predicted TTFT."""
    if kind_of(context) != Kind.PLACE_PREFILL:
        return default_answer(context, candidates, mask)
    router = int(params[1])
    if router == 1:
        choice = least(candidates, mask, Col.QUEUE_N)
    elif router == 2:
        choice = least(candidates, mask, Col.TTFT_S)
    else:
        choice = least(candidates, mask, Col.OUTSTANDING)
    return or_hold(choice, candidates, mask)


RULE = Rule(
    name="chunked",
    doc="all instances mixed, chunked prefill under a token budget, simple router",
    source="Sarathi-Serve (OSDI 2024), section 4: stall-free batching under a token budget",
    decide=decide,
    needs=Need.LOAD | Need.PREDICT,
    params=(
        Param("chunk_tokens", 64, 4096, 512, log=True, integer=True, doc="token budget of one fused step"),
        Param("router", default="tokens", choices=("tokens", "queue", "ttft"), doc="what the router minimises"),
    ),
    arrange=lambda values, setting: all_mixed(setting, int(values["chunk_tokens"])),
)
