"""The result of a comparison, as :func:`eval.compare.paired.compare` makes it and every report reads it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    """Frozen. What a kind of comparison knows beside the fields is kept, and found as an attribute too."""

    model_config = ConfigDict(frozen=True, extra="allow")


class Found(_Part):
    """Goodput of one policy at one target, in ``rate_unit`` of the comparison, with its 95 % interval if it has one.

    Of a sustained one also what it was found with (``at``), and the rate above it that fails (``above``), with why.
    """

    rate: float
    low: float | None
    high: float | None
    per_gpu: float
    at: dict[str, Any] | None = None
    above: dict[str, Any] | None = None
    fails_above: str = ""

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high); the figure itself where there is none."""
        return (self.rate if self.low is None else self.low), (self.rate if self.high is None else self.high)


class Share(_Part):
    """A share of requests, or the difference of two, with its interval of 95 %."""

    value: float
    low: float
    high: float


class Gap(_Part):
    """A difference or a ratio of two goodputs; None where it has no value or no bound."""

    value: float | None
    low: float | None
    high: float | None


class Beside(_Part):
    """Goodput of a pair at one target."""

    ratio: Gap
    difference: Gap


class Pair(_Part):
    """How policy ``a`` stands to ``b``: ratio a ÷ b, differences a − b."""

    a: str
    b: str
    goodput: dict[str, Beside]
    attainment: list[dict[str, Any]]
    mean_attainment: Share | None = None


class Side(_Part):
    """One policy: its goodput by target (as text, ``0.9``) and its points, one for each rate, in ascending order.

    A point is the row of a table: ``rate``, ``slo_attainment`` with ``low`` and ``high``, latencies, counts, ``runs``.
    """

    label: str
    policy_id: str
    values: dict[str, Any]
    tuned: bool
    goodput: dict[str, Found]
    points: list[dict[str, Any]]
    cluster: list[dict[str, Any]] = []
    iqm_attainment: Share | None = None
    classic_goodput: dict[str, Found] = {}
    sustained: dict[str, Any] = {}

    @property
    def is_learned(self) -> bool:
        """Whether it is a checkpoint folder rather than a published rule."""
        return os.path.isdir(self.policy_id) or "/" in self.policy_id

    def at(self, target: float) -> Found:
        """Goodput at ``target``."""
        return self.goodput[f"{target:g}"]

    def classic_at(self, target: float) -> Found:
        """Classic goodput at ``target``, where the sustained one leads."""
        return self.classic_goodput[f"{target:g}"]


class Comparison(_Part):
    """:ivar mode: ``goodput`` or ``rates``, what was asked for
    :ivar targets: shares of requests, the one that leads first
    :ivar at_rate: the best goodput, where all policies were measured; ``second_rate`` likewise; None without a search
    :ivar settings: how it was made; ``shadow``: where the two best policies decide differently
    :ivar goodput_kind: ``sustained`` where that leads, by ``definition``
    """

    mode: str
    targets: list[float]
    at_rate: float | None
    second_rate: float | None
    simulated_requests: int
    policies: list[Side]
    pairs: list[Pair]
    settings: dict[str, Any] = {}
    shadow: dict[str, Any] | None = None
    goodput_kind: str = ""
    definition: dict[str, Any] = {}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """:raises pydantic.ValidationError: ``content`` is not what :meth:`to_json` gave"""
        return cls.model_validate(content)

    def to_json(self) -> dict[str, Any]:
        """What ``result.json`` holds."""
        return self.model_dump(mode="json", exclude_unset=True)

    def having(self, **changes: Any) -> Self:
        """The same with other fields."""
        return self.model_copy(update=changes)

    @property
    def searched(self) -> bool:
        """Whether goodput was searched for; else rates were asked."""
        return self.mode == "goodput"

    @property
    def is_sustained(self) -> bool:
        """Whether its goodput is the sustained one; else it is the classic one."""
        return self.goodput_kind == "sustained"

    @property
    def rate_unit(self) -> str:
        """What its rates count: ``requests/s`` or ``sessions/s``."""
        return str(self.settings.get("rate_unit", "requests/s"))

    @property
    def lead(self) -> float:
        """The target that leads."""
        return self.targets[0]

    def side(self, label: str) -> Side:
        """The policy called ``label``."""
        return next(side for side in self.policies if side.label == label)

    def ranking(self) -> list[Side]:
        """Policies, best first: by goodput at the first target, or by attainment over the rates."""
        if self.searched:
            return sorted(self.policies, key=lambda side: -side.at(self.lead).rate)
        return sorted(self.policies, key=lambda side: -_asked(side.iqm_attainment).value)

    def duel(self) -> tuple[Side, Side | None]:
        """The best learned policy (without one, the best of all) and the best rule beside it."""
        order = self.ranking()
        subject = next((side for side in order if side.is_learned), order[0])
        return subject, next((side for side in order if side is not subject and not side.is_learned), None)

    def meeting_point(self, side: Side) -> dict[str, Any]:
        """Where policies are put side by side: at the best one's goodput, or at the highest rate asked."""
        rate = self.at_rate or side.points[-1]["rate"]
        return next(point for point in side.points if point["rate"] == rate)

    def difference(self, subject: Side, rival: Side) -> tuple[float, float]:
        """Interval of subject − rival in what leads: goodput at the first target, or mean attainment."""
        pair, sign = self._pair(subject.label, rival.label)
        gap = pair.goodput[f"{self.lead:g}"].difference if self.searched else _asked(pair.mean_attainment)
        assert gap.low is not None, "the target that leads has an interval"
        assert gap.high is not None, "the target that leads has an interval"
        return (gap.low, gap.high) if sign > 0 else (-gap.high, -gap.low)

    def ratio(self, subject: Side, rival: Side, target: float | None = None) -> Gap:
        """Subject ÷ rival in goodput at a target, the first one where none is given."""
        target = self.lead if target is None else target
        pair, sign = self._pair(subject.label, rival.label)
        found = pair.goodput[f"{target:g}"].ratio
        low, high = (found.low, found.high) if sign > 0 else (_inverse(found.high), _inverse(found.low))
        ours, theirs = subject.at(target).rate, rival.at(target).rate
        return Gap(value=ours / theirs if theirs > 0.0 else None, low=low, high=high)

    def mean_difference(self, subject: Side, rival: Side) -> float:
        """Mean attainment of subject − rival over the rates asked."""
        pair, sign = self._pair(subject.label, rival.label)
        return sign * _asked(pair.mean_attainment).value

    def _pair(self, a: str, b: str) -> tuple[Pair, float]:
        for pair in self.pairs:
            if {pair.a, pair.b} == {a, b}:
                return pair, 1.0 if pair.a == a else -1.0
        raise KeyError((a, b))


def _asked(share: Share | None) -> Share:
    assert share is not None, "only where rates were asked"
    return share


def _inverse(value: float | None) -> float | None:
    if value is None:
        return 0.0
    return 1.0 / value if value > 0 else None
