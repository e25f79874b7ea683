"""What the search over days may choose: a rule's numbers, its choices, and the levers that every rule gets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from env.scenario import Scenario
from env.surrogate.arena import arena_of
from policies import registry
from policies.rule import BoundPolicy, Param, Value
from train.search.levers import EVERY, Levers

Values = dict[str, Value]
#: Shares of the instances that prefill in compositions that stay; what lies between is found by the search.
_STAYS = (0.0, 1 / 6, 1 / 3, 0.5)


@dataclass(frozen=True)
class Axis:
    """A parameter as a coordinate from 0 to 1."""

    param: Param

    def value(self, x: float) -> Value:
        p = self.param
        y = p.low * (p.high / p.low) ** x if p.log else p.low + x * (p.high - p.low)
        y = min(max(float(y), p.low), p.high)
        return round(y) if p.integer else y

    def place(self, value: Value) -> float:
        p, y = self.param, float(value)
        return float(np.log(y / p.low) / np.log(p.high / p.low)) if p.log else (y - p.low) / (p.high - p.low)


class Space:
    """A rule in a scenario.

    :param arranges: the rule's own parameters say how instances and queues are arranged: it gets no levers
    """

    def __init__(self, rule: str, scenario: Scenario, *, arranges: bool) -> None:
        self.rule, self.setting = registry.get(rule), arena_of(scenario).setting
        self._levers = Levers(rule, self.setting, () if arranges else EVERY)
        self._numbers = [p for p in self._levers.params if p.choices is None]
        self.axes = [Axis(p) for p in (*self.rule.params, *self._numbers) if p.choices is None]
        self._choices = [p for p in self.rule.params if p.choices is not None]

    @property
    def defaults(self) -> Values:
        return self.rule.values() | self._levers.defaults

    def choices(self) -> list[Values]:
        """Where a search may begin: every combination of the rule's choices and the order of queues, on instances as
        the rule arranges them; of a planner that keeps its first composition, several of these, with queues on time."""
        names = [p.name for p in self._choices]
        orders = [p for p in self._levers.params if p.name == "lever.order"]
        options: list[tuple[Value, ...]] = [tuple(p.choices or ()) for p in (*self._choices, *orders)]
        names += [p.name for p in orders]
        found: list[Values] = [dict(zip(names, picked, strict=True)) for picked in product(*options)]
        stays = [choices for choices in found if choices.get("by") == "nothing"]
        stays = [choices | {"start": share} for choices in stays if choices["order"] == "on_time" for share in _STAYS]
        return [choices for choices in found if choices.get("by") != "nothing"] + stays

    def compositions(self) -> list[Values]:
        """Further starts: every composition of roles, its queues on time."""
        return self._levers.starts()[1:]

    def axes_of(self, choices: Values) -> list[Axis]:
        """The axes that matter with these ``choices``."""
        return [axis for axis in self.axes if axis.param.matters(self.defaults | choices)]

    def values(self, choices: Values, theta: np.ndarray) -> Values:
        """The point ``theta`` (one coordinate for each of ``axes_of``) of the part that ``choices`` picks."""
        axes = self.axes_of(choices)
        return self.defaults | choices | {axis.param.name: axis.value(x) for axis, x in zip(axes, theta, strict=True)}

    def place(self, choices: Values) -> np.ndarray:
        """Coordinates of the defaults, as far as ``choices`` leave them."""
        values = self.defaults | choices
        return np.array([axis.place(values[axis.param.name]) for axis in self.axes_of(choices)])

    def split(self, values: Values) -> tuple[Values, Values]:
        """(the rule's own, its levers)."""
        own = {name: value for name, value in values.items() if not name.startswith("lever.")}
        return self.rule.values(own), {name: value for name, value in values.items() if name.startswith("lever.")}

    def bind(self, values: Values) -> BoundPolicy:
        """:raises SlalomError: the rule does not fit this scenario so"""
        own, levers = self.split(values)
        plans = self._levers.plans(levers, own) if levers else None
        bound = self.rule.bind(own, self.setting)
        return bound if plans is None else replace(bound, arrangement=plans)
