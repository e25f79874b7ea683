"""What the direct search varies: arrangements of the instances, and the weights of a context-conditioned score.

A point of the search is a :class:`Design`: a published rule (or the linear score) with its parameters, an
arrangement, and an offset ``theta`` in the coordinates of :class:`Space`. ``theta = None`` is the rule itself, so
whatever the search starts from is one of its points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from engine.core.columns import Col, Ctx, Kind
from engine.core.kinds import Order, Role
from engine.core.policy import InstancePlan
from policies import registry
from policies.arrangement import fitted, resized
from policies.checkpoint.folder import bind_network
from policies.network.features import N_CONTEXT_FEATURES, N_FEATURES, SLACK_MISS
from policies.network.normalise import default_normalisation
from policies.network.scoring import ScoringNetwork
from policies.rule import BoundPolicy, Param, Value
from policies.rules import linear_score
from policies.setting import Setting
from train.search.arrange import ORDERS, random_plans

_HIDDEN = 4  # the least a checkpoint may have; its residual is zero and is skipped when it runs
_NO_HOLD = 8.0  # where the cost of HOLD and SHED starts when the rule never does either: out of reach, but not far
_NEEDED = (Ctx.SIZE, Ctx.AGE, Ctx.LOAD_MEAN, Ctx.LOAD_MIN, Ctx.BATCH_MEAN, Ctx.KV_MEAN, Ctx.HELD, Ctx.PROMPT_RATIO)
_HEALTH = (Ctx.TTFT_OK, Ctx.TPOT_OK)
_ROLE_COLUMNS = {
    Role.PREFILL: Col.ROLE_PREFILL,
    Role.DECODE: Col.ROLE_DECODE,
    Role.MIXED: Col.ROLE_MIXED,
    Role.MULTIPLEXED: Col.ROLE_MULTIPLEXED,
}


@dataclass(frozen=True)
class Coordinate:
    """One number of the search. Exactly one of (kind, feature) and ``plan`` is set.

    :param context: None moves the weight itself, else its slope in this (normalised) context feature
    :param step: what one unit of ``theta`` means
    :param plan: field of :class:`InstancePlan` that is multiplied by 2 ** (step · theta)
    """

    step: float
    kind: int = -1
    feature: int = -1
    context: int | None = None
    plan: str = ""
    bonus: int | None = None


@dataclass(frozen=True, eq=False)
class Design:
    """A policy as the search sees it.

    :param rule: advisor, or ``linear_score``, whose weights are then the start of the score
    :param plans: arrangement; None: the rule's. ``universal``: what each instance takes the one from that suits its
        profile, :func:`policies.arrangement.fitted`
    :param theta: offsets in the coordinates of :class:`Space`; None: the rule as it is
    :param universal: the coordinates are those of every scenario, so that ``theta`` means the same in all of them
    :param kinds: only the weights of these decision kinds are searched, everything else (also budgets of the
        arrangement) stays as it is; None: all there is
    """

    rule: str
    values: dict[str, Value] = field(default_factory=dict)
    plans: tuple[InstancePlan, ...] | None = None
    theta: np.ndarray | None = None
    universal: bool = False
    kinds: frozenset[Kind] | None = None

    @classmethod
    def of(cls, facts: Mapping[str, Any], universal: bool = False) -> Design:
        """The design whose :attr:`facts` these are."""
        plans, theta = facts.get("plans"), facts.get("theta")
        return cls(
            facts["rule"], facts["values"], None if plans is None else tuple(InstancePlan(**plan) for plan in plans),
            None if theta is None else np.array(theta), universal,
        )  # fmt: skip

    @property
    def facts(self) -> dict[str, Any]:
        """Rule, values, plans and theta as JSON data."""
        plans = None if self.plans is None else [asdict(plan) for plan in self.plans]
        theta = None if self.theta is None else self.theta.tolist()
        return {"rule": self.rule, "values": dict(self.values), "plans": plans, "theta": theta}

    def bind(self, setting: Setting) -> BoundPolicy:
        """Ready to run.

        :raises SlalomError: the rule does not fit this scenario
        """
        base = self.base(setting)
        if self.theta is None:
            return base
        space = Space(setting, self)
        base = replace(base, arrangement=space.plans(self.theta))
        return bind_network(base, space.network(self.theta).arrays(), default_normalisation(), setting, self.rule)

    def base(self, setting: Setting) -> BoundPolicy:
        """The rule alone, on this arrangement."""
        base = registry.get(self.rule).bind(self.values, setting)
        if self.plans is None:
            return base
        chosen = fitted(self.plans, setting) if self.universal else resized(self.plans, setting.n_instances)
        return replace(base, arrangement=chosen)

    def network(self, setting: Setting, hidden: int, scale: float) -> ScoringNetwork:
        """A network that decides as this design does, for PPO to go on from."""
        space = Space(setting, self)
        if self.theta is not None or space.advised:
            return space.network(np.zeros(len(space)) if self.theta is None else self.theta, hidden, scale)
        weights = linear_score.weights(registry.get("linear_score").values(self.values))
        return ScoringNetwork(weights, hidden=hidden, scale=scale)

    def choices(self, setting: Setting) -> list[InstancePlan] | None:
        """What a checkpoint keeps: of a universal design the plans to choose from, else :meth:`arrangement`."""
        if self.universal and self.plans is not None and self.theta is not None:
            return Space(setting, self).moved(self.plans, self.theta)
        return self.arrangement(setting)

    def arrangement(self, setting: Setting) -> list[InstancePlan] | None:
        """The plans it runs on; None: the scenario's."""
        if self.theta is not None:
            return Space(setting, self).plans(self.theta)
        found = self.base(setting).arrangement
        return None if found is None else list(found)


class Space:
    """The coordinates around a design, as far as its scenario and arrangement can feel them."""

    def __init__(self, setting: Setting, design: Design) -> None:
        self.design, self._setting = design, setting
        self.start = design.base(setting).arrangement
        self.advised = design.rule != "linear_score"
        roles = (
            {p.role if p.role is not None else r for p, r in zip(self.start, setting.roles, strict=True)}
            if (self.start is not None)
            else set(setting.roles)
        )
        every = design.universal  # levers that this scenario lacks have their place all the same
        found = (
            *_prefill(roles, hold=every or setting.allow_hold, shed=every or setting.allow_shed),
            *_decode(),
            *(_reallocate() if Kind.REALLOCATE in setting.kinds and not every else ()),
            *(_tune() if Kind.TUNE in setting.kinds and not every else ()),
            *_plan_coordinates((design.plans if every else self.start) or ()),
        )
        kinds = frozenset(Kind) if design.kinds is None else design.kinds
        self.coordinates = tuple(c for c in found if design.kinds is None or c.kind in kinds)
        self._base = np.zeros((len(Kind), N_FEATURES))
        if not self.advised:
            self._base = linear_score.weights(registry.get("linear_score").values(design.values))
        for column in (Col.IS_HOLD, Col.IS_SHED):
            # an advisor's HOLD is as good as any other advice; without one, holding back has a price
            free = not self.advised and Kind.PLACE_PREFILL in kinds
            if free and self._base[Kind.PLACE_PREFILL, column] >= linear_score.NEVER:
                self._base[Kind.PLACE_PREFILL, column] = _NO_HOLD

    def __len__(self) -> int:
        return len(self.coordinates)

    def network(self, theta: np.ndarray, hidden: int = _HIDDEN, scale: float = 1.0) -> ScoringNetwork:
        """The score at ``theta``; its residual is zero.

        :param scale: factor of all logits: how sure a policy that draws its answers is of them
        """
        base, gate = self._base.copy(), np.zeros((len(Kind), N_CONTEXT_FEATURES, N_FEATURES))
        for c, offset in zip(self.coordinates, theta, strict=True):
            if c.kind < 0:
                continue
            if c.context is None:
                base[c.kind, c.feature] += c.step * offset
            else:
                gate[c.kind, c.context, c.feature] += c.step * offset
        bonus = np.full(len(Kind), scale) if self.advised else None
        return ScoringNetwork(base, hidden=hidden, scale=scale, gate=gate, bonus=bonus)

    def plans(self, theta: np.ndarray) -> list[InstancePlan] | None:
        """The arrangement at ``theta``."""
        if self.start is None:
            return None
        if self.design.universal and self.design.plans is not None:
            return fitted(self.moved(self.design.plans, theta), self._setting)
        return self.moved(self.start, theta)

    def moved(self, plans: Sequence[InstancePlan], theta: np.ndarray) -> list[InstancePlan]:
        """``plans`` with their budgets as ``theta`` says."""
        factors = {c.plan: 2.0 ** (c.step * x) for c, x in zip(self.coordinates, theta, strict=True) if c.plan}
        return [replace(plan, **scaled(plan, factors)) for plan in plans]


def scaled(plan: InstancePlan, factors: Mapping[str, float]) -> dict[str, Any]:
    """The budgets that ``plan`` has, times their factors, within their limits."""
    changes: dict[str, Any] = {}
    for name, factor in factors.items():
        value = getattr(plan, name)
        if value is None:
            continue
        if name == "headroom":
            changes[name] = float(np.clip(value * factor, 0.1, 2.0))
        else:
            changes[name] = int(np.clip(round(value * factor), 64, 65536))
    return changes


def _prefill(roles: set[int], *, hold: bool, shed: bool) -> list[Coordinate]:
    kind = int(Kind.PLACE_PREFILL)
    columns = {entry[0]: 0.1 * (entry[2] - entry[1]) for entry in linear_score._PREFILL.values()}
    present = [column for role, column in _ROLE_COLUMNS.items() if role in roles]
    for column in _ROLE_COLUMNS.values():
        if column not in present or len(present) < 2:
            columns.pop(column, None)
    found = [Coordinate(step, kind, int(column)) for column, step in columns.items()]
    for allowed, column in ((hold, Col.IS_HOLD), (shed, Col.IS_SHED)):
        if allowed:
            found.append(Coordinate(1.0, kind, int(column)))
            found += [Coordinate(0.5, kind, int(column), int(c)) for c in (*_NEEDED, *_HEALTH)]
    slopes = [Col.TTFT, Col.QUEUE_WORK, SLACK_MISS, Col.STEP_WITH, Col.BATCH, Col.CHUNK, Col.CACHED]
    slopes += present if len(present) > 1 else []
    found += [Coordinate(0.3, kind, int(column), int(c)) for column in slopes for c in (Ctx.SIZE, Ctx.AGE)]
    return found


def _decode() -> list[Coordinate]:
    kind = int(Kind.PLACE_DECODE)
    columns = {entry[0]: 0.1 * (entry[2] - entry[1]) for entry in linear_score._DECODE.values()}
    found = [Coordinate(step, kind, int(column)) for column, step in columns.items()]
    return found + [Coordinate(0.5, kind, int(Col.IN_PLACE), int(c)) for c in (Ctx.BATCH_MEAN, Ctx.LOAD_MEAN, Ctx.SIZE)]


def _reallocate() -> list[Coordinate]:
    """Slopes of the new role in what tells which phase is short; KEEP starts 5 below every change."""
    kind = int(Kind.REALLOCATE)
    signals = (Ctx.LOAD_MEAN, Ctx.BATCH_MEAN, Ctx.KV_MEAN, Ctx.PREFILL_RHO, Ctx.TTFT_OK, Ctx.TPOT_OK, Ctx.PREFILL_SHARE)
    found = [Coordinate(1.0, kind, int(Col.IS_KEEP))]
    for column in (Col.TO_PREFILL, Col.TO_DECODE, Col.TO_MIXED):
        found += [Coordinate(1.0, kind, int(column))] + [Coordinate(1.0, kind, int(column), int(c)) for c in signals]
    return found


def _tune() -> list[Coordinate]:
    kind = int(Kind.TUNE)
    found = [Coordinate(1.0, kind, int(Col.IS_KEEP))]
    for column in (Col.SPLIT_DELTA, Col.CHUNK_DELTA):
        found += [
            Coordinate(1.0, kind, int(column), int(c))
            for c in (Ctx.LOAD_MEAN, Ctx.BATCH_MEAN, Ctx.TTFT_OK, Ctx.TPOT_OK, Ctx.DECODE_RHO)
        ]
    return found


def _plan_coordinates(plans: Sequence[InstancePlan]) -> list[Coordinate]:
    steps = {"chunk_tokens": 0.3, "prefill_tokens": 0.3, "headroom": 0.1}
    return [Coordinate(step, plan=n) for n, step in steps.items() if any(getattr(p, n) is not None for p in plans)]


# -- where the search begins -----------------------------------------------------------------------------------


def random_values(params: Sequence[Param], rng: np.random.Generator) -> dict[str, Value]:
    """A value for every parameter, uniform over its range (in the logarithm where it says so)."""
    values: dict[str, Value] = {}
    for p in params:
        if p.choices is not None:
            values[p.name] = p.choices[int(rng.integers(len(p.choices)))]
            continue
        u = rng.random()
        x = p.low * (p.high / p.low) ** u if p.log else p.low + u * (p.high - p.low)
        values[p.name] = round(x) if p.integer else float(x)
    return values


def random_design(rules: Sequence[str], setting: Setting, rng: np.random.Generator) -> Design:
    """A third published rules as they arrange themselves, a third on other arrangements, a third linear scores."""
    draw = rng.random()
    if draw < 0.66:
        rule = rules[int(rng.integers(len(rules)))]
        plans = None if draw < 0.33 else random_plans(setting, rng)
        return Design(rule, random_values(registry.get(rule).params, rng), plans)
    params = registry.get("linear_score").params
    values = registry.get("linear_score").values()
    if rng.random() < 0.7:
        for p in params:
            if p.choices is None and rng.random() < 0.4:
                values[p.name] = random_values((p,), rng)[p.name]
    return Design("linear_score", values, random_plans(setting, rng))


def reordered(design: Design, setting: Setting, order: Order) -> Design:
    """The same with prefill queues in this order on every instance, everything else as the design arranges it.

    :raises SlalomError: the rule does not fit this scenario
    """
    plans = design.base(setting).arrangement or [InstancePlan()] * setting.n_instances
    return replace(design, plans=tuple(replace(plan, order=int(order)) for plan in plans))


def offspring(parents: Sequence[Design], n: int, rng: np.random.Generator) -> list[Design]:
    """At most ``n`` designs with the rule of one parent, or the plain linear score, on the arrangement of another.

    A good score and a good arrangement are seldom drawn together.
    """
    rules = (Design("linear_score"), *parents)
    pairs = [(rule, place) for place in parents if place.plans is not None for rule in rules if rule is not place]
    chosen = rng.permutation(len(pairs))[:n]
    return [replace(pairs[i][0], plans=pairs[i][1].plans) for i in chosen]


def varied(design: Design, rng: np.random.Generator) -> Design:
    """A neighbour: some parameters drawn anew or moved, budgets of the arrangement moved."""
    rule = registry.get(design.rule)
    values = rule.values(design.values)
    for p in rule.params:
        if rng.random() >= min(0.5, 3.0 / len(rule.params)):
            continue
        if p.choices is not None or rng.random() < 0.3:
            values[p.name] = random_values((p,), rng)[p.name]
            continue
        old, width = float(values[p.name]), 0.15
        move = width * rng.normal()
        new = old * (p.high / p.low) ** move if p.log else old + (p.high - p.low) * move
        new = float(np.clip(new, p.low, p.high))
        values[p.name] = round(new) if p.integer else new
    plans = design.plans
    if plans is not None:
        spreads = {"chunk_tokens": 0.7, "prefill_tokens": 0.7, "headroom": 0.15}
        factors = {name: 2.0 ** rng.normal(0.0, spread) for name, spread in spreads.items()}
        order = int(rng.choice(ORDERS)) if rng.random() < 0.2 else None
        plans = tuple(
            replace(p, **scaled(p, factors), order=p.order if order is None or p.order is None else order)
            for p in plans
        )
    return Design(design.rule, values, plans)
