"""Compiled helpers of published systems: pools by role, loads, and minima within a pool.

A cluster with roles lists every instance for PLACE_PREFILL, decode instances too, because a policy may
multiplex a prompt into them. These helpers say which instances a system means by "prefill" and "decode".
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col
from engine.core.kinds import Role
from engine.jit.kernel import kernel
from policies.common import is_instance, least

_PREFILL, _DECODE = int(Role.PREFILL), int(Role.DECODE)


@kernel
def in_prefill_pool(candidates, mask, k):
    """Whether row ``k`` is an allowed instance whose role is to prefill (everything but DECODE)."""
    return is_instance(candidates, mask, k) and int(candidates[k, Col.ROLE]) != _DECODE


@kernel
def in_decode_pool(candidates, mask, k):
    """Whether row ``k`` is an allowed instance of role DECODE."""
    return is_instance(candidates, mask, k) and int(candidates[k, Col.ROLE]) == _DECODE


@kernel
def least_prefill(candidates, mask, first, second):
    """Row of the prefill pool with the least ``first`` column, ties by ``second``, then by row.

    Without a prefill pool any allowed instance will do; -1 when none is allowed.
    """
    best, a, b = -1, np.inf, np.inf
    for k in range(candidates.shape[0]):
        if in_prefill_pool(candidates, mask, k):
            x, y = candidates[k, first], candidates[k, second]
            if best < 0 or x < a or (x == a and y < b):
                best, a, b = k, x, y
    return best if best >= 0 else least(candidates, mask, first)


@kernel
def waiting(candidates, k):
    """Prompts waiting at row ``k``, without the one whose prefill has begun."""
    return max(candidates[k, Col.QUEUE_N] - candidates[k, Col.PREFILLING], 0.0)


@kernel
def requests(candidates, k):
    """Requests a router has outstanding at row ``k``: queued, running and inbound."""
    return candidates[k, Col.QUEUE_N] + candidates[k, Col.RUN_N] + candidates[k, Col.INBOUND_N]


@kernel
def tokens(candidates, k):
    """Context tokens that row ``k`` decodes or is about to receive."""
    return candidates[k, Col.RUN_CTX] + candidates[k, Col.INBOUND_TOKENS]


@kernel
def kv_use(candidates, k):
    """Used share of the KV pool of row ``k``, 0..1."""
    total = candidates[k, Col.TOTAL_BLOCKS]
    return 1.0 - candidates[k, Col.FREE_BLOCKS] / total if total > 0.0 else 0.0


@kernel
def row_of(candidates, mask, column):
    """First allowed row with ``candidates[:, column]`` set (HOLD, SHED, KEEP); -1 when there is none.

    HOLD and SHED are told apart by their flag, which every row without an instance carries.
    """
    for k in range(candidates.shape[0]):
        if mask[k] != 0 and candidates[k, Col.INSTANCE] < 0.0 and candidates[k, column] > 0.0:
            return k
    return -1
