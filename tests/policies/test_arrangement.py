"""Arrangements that follow from the profile of each instance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from engine.core.columns import Col, Ctx, Kind
from engine.core.kinds import Batching, Order, Role
from engine.core.policy import InstancePlan
from env.measure.metrics import outcomes
from env.scenario import Scenario
from env.surrogate.arena import arena_of
from env.surrogate.simulate import bind_policy, simulate
from eval.studies.zeroshot import variant
from policies import registry
from policies.arrangement import fitted, served_per_s
from policies.checkpoint.folder import Facts, load, save_network
from policies.network.scoring import ScoringNetwork
from policies.rules import linear_score
from policies.rules.parts.python import python_rule

ORDER = int(Order.ON_TIME)
SHARED = InstancePlan(role=Role.MULTIPLEXED, batching=Batching.LAYERED, split=-1, order=ORDER, prefill_tokens=2048)
MIXED = InstancePlan(role=Role.MIXED, batching=Batching.CHUNKED, order=ORDER, chunk_tokens=1024)
BOTH = (SHARED, MIXED)
CONV = Scenario.load("azure-conv-4xa100")


def _roles(plans: list[InstancePlan]) -> list[int | None]:
    return [plan.role for plan in plans]


def test_every_instance_takes_the_plan_that_suits_its_profile() -> None:
    fleet = arena_of(Scenario.load("fleet-2xa100-2xh100")).setting
    assert _roles(fitted(BOTH, fleet)) == [Role.MULTIPLEXED] * 2 + [Role.MIXED] * 2
    only = replace(fleet, usable_roles=frozenset({Role.MIXED}))
    assert _roles(fitted(BOTH, only)) == [Role.MIXED] * 4


@pytest.mark.parametrize(
    ("name", "profile", "better"),
    [
        ("azure-conv-4xa100", "llama-8b-h100", Role.MIXED),
        ("tiny-4xa100", None, Role.MIXED),
        ("shift-pd-8xa100", None, Role.MULTIPLEXED),
    ],
)
def test_the_plan_it_takes_serves_more(name: str, profile: str | None, better: Role) -> None:
    """Beyond the knee of both, the plan that is predicted to serve more meets more targets."""
    scenario = variant(Scenario.load(name), profile=profile)
    setting, n = arena_of(scenario).setting, len(scenario.placements())
    assert fitted(BOTH, setting)[0].role == better
    rate = 0.9 * n * max(served_per_s(plan, setting, 0) for plan in BOTH)
    policy, good = bind_policy("predicted_ttft", scenario), {}
    for plan in BOTH:
        run = simulate(scenario, replace(policy, arrangement=[plan] * n), rate=rate, n_requests=3000)
        good[plan.role] = outcomes(run).good.mean()
    assert max(good, key=lambda role: good[role]) == better


def test_without_shares_or_seats_there_is_no_such_plan() -> None:
    setting = arena_of(Scenario.load("distserve-13b-3xa100")).setting
    assert served_per_s(SHARED, setting, 0) == 0.0  # the profile has no SM shares
    assert served_per_s(MIXED, setting, 0) > 0.0
    assert served_per_s(InstancePlan(role=Role.PREFILL), setting, 0) == 0.0
    conv = arena_of(CONV).setting
    few = replace(conv, max_batch=(8,) * 4)
    for plan in BOTH:
        assert served_per_s(plan, few, 0) < 0.7 * served_per_s(plan, conv, 0)


def test_a_checkpoint_brings_the_choice_along(tmp_path: Path) -> None:
    network = ScoringNetwork(linear_score.weights(registry.get("linear_score").values()), hidden=4)
    facts = Facts("any", arrangement=BOTH, fitted=True)
    save_network(tmp_path / "any", network, base="linear_score", base_values={}, profile={}, facts=facts)
    loaded = load(tmp_path / "any")
    on_h100 = variant(CONV, profile="llama-8b-h100")
    assert _roles(list(loaded.bind(arena_of(on_h100).setting).arrangement or ())) == [Role.MIXED] * 4
    assert _roles(list(loaded.bind(arena_of(CONV).setting).arrangement or ())) == [Role.MULTIPLEXED] * 4


class Watch:
    """Takes the first instance and remembers what it is shown."""

    name = "watch"
    seen: ClassVar[list[np.ndarray]] = []

    def decide(self, context: np.ndarray, candidates: np.ndarray, mask: np.ndarray) -> int:
        if context[Ctx.KIND] == Kind.PLACE_PREFILL:
            self.seen.append(candidates[:4, [Col.PREFILL, Col.STEP_WITH]].copy())
        return int(mask.argmax())


def test_a_policy_sees_how_fast_each_instance_is() -> None:
    """Of idle instances the same prompt, and a step with it, takes less of its target the faster the instance."""
    fleet = Scenario.load("fleet-2xa100-2xh100")
    policy = python_rule(Watch, "watch").bind({}, arena_of(fleet).setting)
    simulate(fleet, policy, rate=0.01, n_requests=20)
    prefill, step = np.array(Watch.seen).transpose(2, 0, 1)
    assert len(prefill) == 20
    assert (prefill[:, 2] < 0.8 * prefill[:, 1]).all()
    assert (step[:, 2] < 0.9 * step[:, 1]).all()
    assert (prefill[:, 2] == prefill[:, 3]).all()
