"""A rule: a compiled decision with named, bounded parameters that a search may tune.

A published system is one file of this folder that ends in ``RULE = Rule(...)``. ``Rule.bind`` turns it, with
values and a scenario, into the :class:`engine.core.policy.Policy` that the engine and the surrogate run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.core.columns import Need
from engine.core.policy import InstancePlan
from engine.errors import SlalomError, no_such
from policies.setting import Setting, SloTarget

if TYPE_CHECKING:
    import optuna

__all__ = ["BoundPolicy", "InstancePlan", "Param", "Rule", "Setting", "SloTarget", "Value"]

Value = float | int | str


@dataclass(frozen=True)
class Param:
    """One tunable value of a rule.

    :param low: least value (ignored for ``choices``)
    :param high: greatest value
    :param log: search on a logarithmic scale
    :param integer: whole numbers only
    :param choices: the values allowed, instead of a range; the params array holds the *index*
    :param by_hand: further values that may be given, but that a search never draws
    :param off: a trial takes what it draws below this as ``low``, which switches something off. It would never draw
        exactly ``low``, and a value beside it may do harm: one prompt in some hundred that is placed at random
    :param when: the choices of other parameters with which this one matters, by name; nothing named: with all
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    default: Value = 0.0
    log: bool = False
    integer: bool = False
    choices: tuple[Value, ...] | None = None
    doc: str = ""
    by_hand: tuple[Value, ...] = ()
    off: float | None = None
    when: tuple[tuple[str, tuple[Value, ...]], ...] = ()

    def matters(self, choices: Mapping[str, Value]) -> bool:
        """Whether the rule reads it with these ``choices``."""
        return all(choices.get(name, values[0]) in values for name, values in self.when)

    @property
    def allowed(self) -> tuple[Value, ...]:
        """Every value of a parameter with ``choices``, those of a search first."""
        return (*(self.choices or ()), *self.by_hand)

    def check(self, value: Any, rule: str = "") -> Value:
        """``value`` in its own type. Text is parsed (command line).

        :raises SlalomError: not a number, not finite, out of range, not one of the choices
        """
        where = f"{rule}: {self.name}" if rule else self.name
        if self.choices is not None:
            for choice in self.allowed:
                if value == choice or str(value) == str(choice):
                    return choice
            raise SlalomError(where, value, f"choose one of {list(self.allowed)}")
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise SlalomError(where, value, "give a number") from None
        if not math.isfinite(number) or not self.low <= number <= self.high:
            raise SlalomError(where, value, f"give a value from {self.low:g} to {self.high:g}")
        if not self.integer:
            return number
        if number != int(number):
            raise SlalomError(where, value, "give a whole number")
        return int(number)

    def number(self, value: Value) -> float:
        """What stands in the params array for a checked ``value``."""
        return float(self.allowed.index(value)) if self.choices is not None else float(value)

    def suggest(self, trial: optuna.trial.BaseTrial) -> Value:
        """A value drawn by an Optuna trial."""
        if self.choices is not None:
            choice: Any = trial.suggest_categorical(self.name, list(self.choices))
            return self.check(choice)
        if self.integer:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        drawn = trial.suggest_float(self.name, self.low, self.high, log=self.log)
        return self.low if self.off is not None and drawn < self.off else drawn


@dataclass(frozen=True, eq=False)
class BoundPolicy:
    """A rule with its values, for one scenario; satisfies :class:`engine.core.policy.Policy`.

    ``python`` marks the slow path: ``decide`` calls back into the interpreter and takes the GIL. ``kind`` is
    ``rule`` or ``network``; a network's ``values`` name its base rule and the digest of its weights. A checkpoint
    adds what its guard needs: ``bounds`` of training, float64 (2, context) and (2, candidate), and its ``fallback``.
    """

    name: str
    decide: Any
    needs: int
    params: np.ndarray
    memory: np.ndarray
    arrangement: Sequence[InstancePlan] | None
    values: Mapping[str, Value]
    python: bool = False
    kind: str = "rule"
    bounds: tuple[np.ndarray, np.ndarray] | None = None
    fallback: str | None = None

    def describe(self) -> dict[str, Any]:
        """Plain data (JSON) that says which policy this is and with which values."""
        return {"kind": self.kind, "name": self.name, "values": dict(self.values)}


Values = Mapping[str, Value]


@dataclass(frozen=True, eq=False)
class Rule:
    """A decision rule, its source and what may be tuned in it.

    :param decide: compiled with ``kernel(POLICY_SIGNATURE)``; must answer every :class:`Kind`
    :param source: where the rule comes from (paper, section, equation)
    :param needs: bit mask of :class:`engine.core.columns.Need`; columns not asked for may hold anything
    :param memory_size: float64 cells of memory, or a function of the setting
    :param prepare: (checked values, setting) -> float64 params; by default the values in declared order
    :param arrange: (checked values, setting) -> one plan per instance, or None for the scenario's own
    :param slow: checked values -> a ``decide`` that goes through the interpreter, or None for the rule's own
    """

    name: str
    doc: str
    source: str
    decide: Any
    params: tuple[Param, ...] = ()
    needs: int = int(Need.LOAD)
    memory_size: int | Callable[[Setting], int] = 1
    prepare: Callable[[Values, Setting], np.ndarray] | None = None
    arrange: Callable[[Values, Setting], list[InstancePlan] | None] | None = None
    python: bool = False
    slow: Callable[[Values], Any] | None = None
    _by_name: dict[str, Param] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {p.name: p for p in self.params})
        for param in self.params:
            param.check(param.default, self.name)

    def values(self, given: Mapping[str, Any] | None = None) -> dict[str, Value]:
        """Defaults overlaid with ``given``, checked, in declared order.

        :raises SlalomError: unknown parameter, or a value :meth:`Param.check` refuses
        """
        given = given or {}
        for name in given:
            if name not in self._by_name:
                if not self._by_name:
                    raise SlalomError(f"{self.name}: {name}", given[name], "this rule has no parameters")
                raise no_such(f"{self.name}: parameter", name, self._by_name)
        return {p.name: p.check(given.get(p.name, p.default), self.name) for p in self.params}

    def bind(self, values: Mapping[str, Any] | None, setting: Setting) -> BoundPolicy:
        """The rule ready to run in ``setting``.

        :raises SlalomError: see :meth:`values`; or the rule cannot be arranged on these instances, or not in roles that
            the scenario allows
        """
        checked = self.values(values)
        if self.prepare is None:
            params = np.array([p.number(checked[p.name]) for p in self.params], np.float64)
        else:
            params = np.ascontiguousarray(self.prepare(checked, setting), np.float64)
        plan = self.arrange(checked, setting) if self.arrange else None
        if plan is not None and len(plan) != setting.n_instances:
            raise SlalomError(f"{self.name}: arrangement", len(plan), f"plan {setting.n_instances} instances")
        if plan is not None:
            setting.check_roles(plan, self.name)
        cells = self.memory_size(setting) if callable(self.memory_size) else self.memory_size
        slow = self.slow(checked) if self.slow else None
        return BoundPolicy(
            name=self.name,
            decide=self.decide if slow is None else slow,
            needs=int(self.needs),
            # Compiled code may take the address of either array, so neither is ever empty.
            params=params if params.size else np.zeros(1),
            memory=np.zeros(max(1, cells)),
            arrangement=plan,
            values=checked,
            python=self.python or slow is not None,
        )

    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Value]:
        """One value per parameter, drawn by an Optuna trial."""
        return {p.name: p.suggest(trial) for p in self.params}
