"""What is compared: a contender, a measured point, and what all points of a comparison have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.errors import SlalomError
from policies.rule import Value

#: The policy that is searched instead of named: the best fixed arrangement of a scenario, see ``eval.compare.static``.
STATIC_PLAN = "static_plan"


Split = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class Contender:
    """One policy in a comparison.

    :param policy: name, ``name:param=value`` or a checkpoint folder
    :param values: parameter values that replace the rule's defaults
    :param label: how the report calls it (unique within a comparison)
    :param tuned: its parameters come from a search
    :param cluster: instance groups that replace the scenario's, with every lever but placement off (a fixed plan)
    :param plans: one :class:`engine.core.policy.InstancePlan` per instance, as keywords, instead of the policy's own
        arrangement; every lever stays
    """

    policy: str
    values: Mapping[str, Value] = field(default_factory=dict)
    label: str = ""
    tuned: bool = False
    cluster: tuple[Mapping[str, Any], ...] = ()
    plans: tuple[Mapping[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return self.label or self.policy


@dataclass(frozen=True)
class PointSettings:
    """What every point of one comparison has in common.

    :param detailed: keep every request of a run as well
    :param sessions: ``whole`` measures every turn, however late it comes; ``settled`` what arrives while sessions
        begin, see :func:`env.measure.metrics.outcomes`; ``stream`` plays their turns in the mix of the long run as
        open-loop arrivals, see :func:`env.workload.steady.stream`
    """

    n_requests: int = 10_000
    split: Split = "test"
    warmup: float = 0.05
    drain: float = 0.0
    n_blocks: int = 20
    detailed: bool = False
    sessions: Literal["whole", "settled", "stream"] = "whole"

    @property
    def windows(self) -> dict[str, Any]:
        """What is measured of a run, as :func:`env.measure.metrics.outcomes` takes it."""
        return {"warmup": self.warmup, "drain": self.drain, "settled": self.sessions == "settled"}

    def __post_init__(self) -> None:
        if self.n_requests < self.n_blocks:
            raise SlalomError("requests", self.n_requests, f"at least {self.n_blocks} per run are needed")


@dataclass(frozen=True)
class Point:
    """A measured point: the metrics of ``env.measure.metrics`` and sent/good counts per block of arrivals."""

    rate: float
    seed: int
    metrics: dict[str, Any]
    sent: list[int]
    good: list[int]

    @property
    def attainment(self) -> float:
        return sum(self.good) / max(sum(self.sent), 1)
