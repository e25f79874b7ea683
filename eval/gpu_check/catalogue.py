"""What is measured, in which process and how long it may take; a group's own process measures in this order."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Measurements that share a process.

    :param limit_s: the process is ended after this; all limits together are 8 minutes
    :param measurements: by name, ``module:function`` below this package, imported in the group's process only
    """

    limit_s: float
    measurements: dict[str, str]


GROUPS = {
    "device": Group(
        30.0,
        {
            "versions": "device:versions",
            "sm_resource": "device:sm_resource",
            "all_splits": "device:all_splits",
            "ceilings": "device:ceilings",
        },
    ),
    "smoke": Group(
        40.0,
        {
            "lanes_are_disjoint": "smoke:lanes_are_disjoint",
            "products_on_lanes": "smoke:products_on_lanes",
            "graph_stays_on_its_sms": "smoke:graph_stays_on_its_sms",
            "close_and_reopen": "smoke:close_and_reopen",
        },
    ),
    "kernels": Group(45.0, {"same_tokens": "kernels:same_tokens", "correct": "kernels:correct"}),
    "lanes": Group(
        60.0,
        {
            "graph_follows_capture": "partitions:graph_follows_capture",
            "switch_cost": "partitions:switch_cost",
            "itl": "model:itl",
        },
    ),
    "model": Group(55.0, {"decode": "model:decode", "chunks": "model:chunks", "prefill": "model:prefill"}),
    "engine": Group(60.0, {"engine_tokens": "serving:engine_tokens"}),
    "slowdown": Group(30.0, {"slowdown": "partitions:slowdown"}),
    "flashinfer": Group(20.0, {"flashinfer": "kernels:flashinfer"}),
    "loop": Group(140.0, {"loop": "loop:loop"}),
}
