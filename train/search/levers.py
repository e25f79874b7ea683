"""Levers that every rule gets when it is tuned: what the learned policies may arrange, a rule may as well.

Beside its own parameters a tuned rule chooses who does what (any composition of roles that
:func:`train.search.arrange.composed` knows, or its own), the order of prefill queues, and the budgets of chunks,
prefill batches and SM shares. Names begin with ``lever.`` so that they meet no parameter of a rule.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from engine.core.kinds import Order, Role
from engine.core.policy import InstancePlan
from policies import registry
from policies.rule import Param, Value
from policies.setting import Setting
from train.search.arrange import composed
from train.search.space import scaled

EVERY = ("roles", "order", "chunk_tokens", "prefill_tokens", "headroom")

OWN = "own"  # of the rule, or of the scenario where the rule arranges nothing
_ORDERS = {"fcfs": Order.FCFS, "shortest": Order.SHORTEST, "on_time": Order.ON_TIME}
_FACTOR = {"chunk_tokens": 4.0, "prefill_tokens": 4.0, "headroom": 1.5}


class Levers:
    """What may be arranged in one scenario.

    :param rule: whose own arrangement is one of the choices
    :param free: levers that are searched; the others stay as the rule has them
    """

    def __init__(self, rule: str, setting: Setting, free: Collection[str] = EVERY) -> None:
        self._rule, self._setting = rule, setting
        self._compositions = {label(plans): plans for plans in composed(setting)}
        params = (
            Param("lever.roles", choices=(OWN, *self._compositions), default=OWN),
            Param("lever.order", choices=(OWN, *_ORDERS), default=OWN),
            *(Param(f"lever.{name}", 1.0 / most, most, 1.0, log=True) for name, most in _FACTOR.items()),
        )
        self._all = {p.name: p.default for p in params}
        self.params: tuple[Param, ...] = tuple(p for p in params if p.name.removeprefix("lever.") in free)

    @property
    def defaults(self) -> dict[str, Value]:
        """The rule as published."""
        return {p.name: p.default for p in self.params}

    def starts(self) -> list[dict[str, Value]]:
        """Every composition with its plain budgets and queues on time: the first trials after the defaults."""
        plain: dict[str, Value] = {"lever.order": "on_time"} if "lever.order" in self.defaults else {}
        roles = (OWN, *self._compositions) if "lever.roles" in self.defaults else (OWN,)
        return [self.defaults | plain | ({"lever.roles": r} if len(roles) > 1 else {}) for r in roles]

    def plans(self, levers: Mapping[str, Value], values: Mapping[str, Value]) -> list[InstancePlan] | None:
        """One plan per instance; None: the rule arranges as it does by itself.

        :param values: of the rule
        :raises SlalomError: the rule does not fit this scenario
        """
        if all(levers[name] == value for name, value in self.defaults.items()):
            return None
        levers = self._all | dict(levers)
        roles, order = str(levers["lever.roles"]), str(levers["lever.order"])
        own = registry.get(self._rule).bind(values, self._setting).arrangement if roles == OWN else None
        plans: Sequence[InstancePlan] = self._compositions.get(roles, own or self._scenarios())
        changes: dict[str, Any] = {} if order == OWN else {"order": int(_ORDERS[order])}
        factors = {name: float(levers[f"lever.{name}"]) for name in _FACTOR}
        return [replace(plan, **changes, **scaled(plan, factors)) for plan in plans]

    def _scenarios(self) -> list[InstancePlan]:
        return [InstancePlan()] * self._setting.n_instances


def label(plans: Sequence[InstancePlan]) -> str:
    """Such as ``3 prefill + 1 decode``, in the order of the instances."""
    alike = groupby(Role(plan.role or 0).name.lower() for plan in plans)
    return " + ".join(f"{len(list(same))} {role}" for role, same in alike)
