"""Static split: prefill and decode on separate instances, fixed at start; shortest queue, then least loaded.

The dispatch that prefill/decode disaggregation starts from: a prompt goes to the prefill instance with the
shortest queue, a finished prefill to the decode instance with the least load.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Kind, Need
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.arrangement import prefill_decode_split
from policies.common import default_answer, kind_of, only_decoders, or_hold, takes_prompts
from policies.rule import Param, Rule


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """PLACE_PREFILL: fewest queued prompts, ties to the fewest queued tokens."""
    if kind_of(context) != Kind.PLACE_PREFILL:
        return default_answer(context, candidates, mask)
    everyone = only_decoders(candidates, mask)
    best, prompts, tokens = -1, np.inf, np.inf
    for k in range(candidates.shape[0]):
        if takes_prompts(candidates, mask, k, everyone):
            n, t = candidates[k, Col.QUEUE_N], candidates[k, Col.QUEUE_TOKENS]
            if best < 0 or n < prompts or (n == prompts and t < tokens):
                best, prompts, tokens = k, n, t
    return or_hold(best, candidates, mask)


RULE = Rule(
    name="static_split",
    doc="fixed prefill and decode instances, shortest prefill queue, least loaded decode",
    source="DistServe (OSDI 2024), section 4: dispatch to the shortest queue, then to the least loaded",
    decide=decide,
    needs=Need.LOAD,
    params=(
        Param("prefill_fraction", 0.0, 1.0, 0.5, doc="share of instances that prefill (each side at least 1)"),
        Param("prefill_tokens", 256, 16384, 2048, log=True, integer=True, doc="tokens of one prefill batch"),
    ),
    arrange=lambda values, setting: prefill_decode_split(
        setting, float(values["prefill_fraction"]), int(values["prefill_tokens"]), "static_split"
    ),
)
