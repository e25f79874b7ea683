"""Whether the books of an idle cluster balance: every block free, every queue empty, every sum back at zero."""

from __future__ import annotations

import numpy as np

from engine.core.kinds import LaneKind
from engine.core.lists import ENDED
from engine.core.state import ClusterState

_ZERO_WHEN_IDLE = (
    "queue_tokens", "queue_work", "started_n", "inbound_tokens", "moving_n", "run_n", "run_ctx", "out_n", "held_tokens",
    "parked_n", "parked_work",
)  # fmt: skip


def faults(state: ClusterState) -> list[str]:
    """Sentences about everything that a cluster without requests still holds; empty while it serves some."""
    cluster = state.cluster[0]
    if cluster["n_done"] != cluster["n_sent"] or (state.lane["kind"] != LaneKind.IDLE).any():
        return []
    found = [
        f"instance {i}: {name} is {int(record[name])}"
        for i, record in enumerate(state.inst)
        for name in _ZERO_WHEN_IDLE
        if record[name] != 0
    ]
    found += [f"list {k} holds {n} requests" for k, n in enumerate(state.lists[:, 2]) if n != 0 and k != ENDED]
    found += [f"link {k}: {int(x['tokens'])} tokens" for k, x in enumerate(state.link) if x["tokens"] != 0]
    for p, pool in enumerate(state.pool):
        found += _pool_faults(state, p, pool)
    return found


def _pool_faults(state: ClusterState, p: int, pool: np.void) -> list[str]:
    found = []
    base, n = int(pool["base"]), int(pool["n_blocks"])
    referenced = int(np.count_nonzero(state.block["ref"][base : base + n]))
    if referenced:
        found.append(f"pool {p}: {referenced} blocks are referenced")
    if pool["free"] != n:
        found.append(f"pool {p}: {int(pool['free'])} of {n} blocks are free")
    waiting, block = 0, int(pool["lru_head"])
    while block >= 0 and waiting <= n:
        waiting, block = waiting + 1, int(state.cached[block]["lru_next"])
    if waiting + int(pool["spare_n"]) != n:
        found.append(f"pool {p}: {waiting} cached and {int(pool['spare_n'])} spare blocks do not make {n}")
    return found
