"""What is measured, in which process and how long it may take; a group's own process measures in this order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eval.gpu_check import kernels, loop, model, partitions, serving
from eval.gpu_check.rig import Rig

__all__ = ["GROUPS", "Group"]


@dataclass(frozen=True)
class Group:
    """Measurements that share a process.

    :param limit_s: the process is ended after this
    """

    limit_s: float
    measurements: dict[str, Callable[[Rig], dict[str, Any]]]


GROUPS = {
    "device": Group(
        60.0,
        {
            "versions": partitions.versions,
            "sm_resource": partitions.sm_resource,
            "all_splits": partitions.all_splits,
            "ceilings": partitions.ceilings,
        },
    ),
    "kernels": Group(110.0, {"same_tokens": kernels.same_tokens, "correct": kernels.correct}),
    "slowdown": Group(70.0, {"slowdown": partitions.slowdown}),
    "model": Group(110.0, {"decode": model.decode, "prefill": model.prefill}),
    "lanes": Group(
        130.0,
        {
            "graph_follows_capture": partitions.graph_follows_capture,
            "switch_cost": partitions.switch_cost,
            "itl": model.itl,
        },
    ),
    "engine": Group(200.0, {"engine_tokens": serving.engine_tokens}),
    "loop": Group(300.0, {"loop": loop.loop}),
}
