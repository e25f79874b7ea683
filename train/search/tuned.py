"""What the search over a rule's parameters found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

from policies.rule import Value


class Finalist(TypedDict):
    """A setting of the final ranking: its score in the search and on the fresh validation seeds."""

    values: dict[str, Value]
    levers: dict[str, Value]
    search: float
    final: float


@dataclass(frozen=True)
class TuneResult:
    """What a search found and what it cost.

    :param values: parameter values of the winner of the final ranking
    :param default: score of the rule's own defaults in the final ranking (see ``train.search.fitness.merged``)
    :param score: score of ``values`` in the final ranking
    :param trials: trials of the search
    :param simulated_requests: requests simulated in the search and in the final ranking
    :param rates: of the last part of the search and of the final ranking
    :param pruned: trials that ended early
    :param levers: of the winner, see ``train.search.levers``; ``plans``: its arrangement, one per instance, where it is
        not the rule's own
    :param sampler: which Optuna sampler drew the values
    :param ranking: values, search score and final score of every finalist, best first
    """

    rule: str
    values: dict[str, Value]
    default: float
    score: float
    trials: int
    simulated_requests: int
    sampler: str
    rates: tuple[float, ...]
    ranking: tuple[Finalist, ...]
    pruned: int = 0
    levers: dict[str, Value] = field(default_factory=dict)
    plans: tuple[Mapping[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
