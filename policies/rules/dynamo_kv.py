"""Dynamo KV router: least prefill blocks after overlap plus decode blocks.

    prefill_i = max(active prefill blocks + incoming blocks − overlap_credit · cached blocks, 0)
    linear:   cost_i = prefill_load_scale · prefill_i + decode_blocks_i
    lmetric:  cost_i = prefill_i · (decode_blocks_i + 1)

Lowest cost wins. ``temperature`` > 0 samples a softmax of −cost ÷ temperature, costs scaled to 0..1 over
the workers (inferred scaling). A block is 16 tokens. Queued prompts count with their whole length as
booked.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Ctx, Kind, Need
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.common import default_answer, kind_of, least, or_hold
from policies.rule import Param, Rule
from policies.rules.parts.draws import uniform
from policies.rules.parts.layout import ROUTER_PARAMS, router_layout
from policies.rules.parts.pools import in_prefill_pool, tokens

_BLOCK = 16.0


@kernel
def cost(context, candidates, k, params):
    """Cost of worker ``k``; ``params`` as in :func:`decide`."""
    new = context[Ctx.PROMPT] - params[2] * candidates[k, Col.CACHED_TOKENS]
    prefill = max((candidates[k, Col.QUEUE_TOKENS] + new) / _BLOCK, 0.0)
    decode = tokens(candidates, k) / _BLOCK
    return params[1] * prefill + decode if params[0] == 0.0 else prefill * (decode + 1.0)


@kernel
def _softmax_row(context, candidates, mask, params, low, high, draw):
    """Row at quantile ``draw`` of the softmax over the workers."""
    scale = params[3] * max(high - low, 1e-9)
    total = 0.0
    for k in range(candidates.shape[0]):
        if in_prefill_pool(candidates, mask, k):
            total += np.exp((low - cost(context, candidates, k, params)) / scale)
    row, left = -1, draw * total
    for k in range(candidates.shape[0]):
        if in_prefill_pool(candidates, mask, k) and (row < 0 or left > 0.0):
            row = k
            left -= np.exp((low - cost(context, candidates, k, params)) / scale)
    return row


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: cost (0 linear, 1 lmetric), prefill_load_scale, overlap_credit, temperature, seed."""
    if kind_of(context) != Kind.PLACE_PREFILL:
        return default_answer(context, candidates, mask)
    best, low, high = -1, np.inf, -np.inf
    for k in range(candidates.shape[0]):
        if in_prefill_pool(candidates, mask, k):
            here = cost(context, candidates, k, params)
            high = max(high, here)
            if here < low:
                best, low = k, here
    if best >= 0 and params[3] > 0.0:
        best = _softmax_row(context, candidates, mask, params, low, high, uniform(memory, 0, params[4]))
    if best < 0:
        best = least(candidates, mask, Col.OUTSTANDING)
    return or_hold(best, candidates, mask)


RULE = Rule(
    name="dynamo_kv",
    doc="fewest uncached prefill blocks plus decode blocks, or their product",
    source="NVIDIA Dynamo 1.6 KV router, router_selection_policy default and lmetric",
    decide=decide,
    needs=Need.LOAD | Need.PREDICT,
    params=(
        Param("cost", default="linear", choices=("linear", "lmetric"), doc="sum or product"),
        Param("prefill_load_scale", 0.05, 20.0, 1.0, log=True, doc="weight of prefill blocks (linear)"),
        Param("overlap_credit", 0.0, 2.0, 1.0, doc="blocks forgiven per cached block"),
        Param("temperature", 0.0, 2.0, 0.0, doc="0: lowest cost; above: sampled"),
        Param("seed", 0, 2**31 - 1, 0, integer=True, doc="of its own random numbers"),
        *ROUTER_PARAMS,
    ),
    arrange=router_layout("dynamo_kv"),
)
