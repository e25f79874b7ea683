"""The same case gives the same bytes, and jumping over decode steps changes nothing but the number of events."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numba
import numpy as np
import pytest
from drive import Driver, played
from hypothesis import given, settings
from strategies import Case, RequestSpec, cases

from engine.core.columns import Col
from engine.core.kinds import Role
from engine.core.setup import InstanceSpec
from engine.core.state import ClusterState
from engine.errors import SlalomError
from engine.jit.kernel import kernel
from env.scenario import Scenario, list_scenarios
from env.surrogate.arena import arena_of
from env.surrogate.clock import Sim
from env.surrogate.compiled import compiled
from env.surrogate.simulate import simulate
from policies import registry
from policies.load import load_policy

#: What a run is judged by. Block numbers and planning scratch may differ between jumping and stepping.
OUTCOME = ("req", "cluster", "cls", "itl", "link", "due")
PLANNING = ("steps",)  # times a lane was planned: once per jump
ADDRESSES = ("seen",)  # of arrays: others in every run


def assert_same_outcome(a: ClusterState, b: ClusterState) -> None:
    for name in OUTCOME:
        for field in getattr(a, name).dtype.names or (None,):
            if field in PLANNING:
                continue
            left, right = (getattr(x, name) if field is None else getattr(x, name)[field] for x in (a, b))
            np.testing.assert_array_equal(left, right, err_msg=f"{name}.{field}")


def assert_same_bytes(a: tuple[ClusterState, Sim], b: tuple[ClusterState, Sim]) -> None:
    for x, y in zip(a, b, strict=True):
        for name, left, right in zip(x._fields, x, y, strict=True):
            assert name in ADDRESSES or left.tobytes() == right.tobytes(), name


@settings(max_examples=100)
@given(cases())
def test_a_case_played_twice_leaves_the_same_bytes(case: Case) -> None:
    assert_same_bytes(played(case), played(case))


@settings(max_examples=400)
@given(cases())
def test_jumping_and_stepping_give_the_same_timeline(case: Case) -> None:
    jumped, jump_sim = played(case)
    stepped, step_sim = played(case, fast_forward=False)
    assert_same_outcome(jumped, stepped)
    assert jump_sim.sim["now"] == step_sim.sim["now"]
    assert jump_sim.sim["decisions"] == step_sim.sim["decisions"]
    assert jump_sim.sim["events"] <= step_sim.sim["events"]


def test_the_least_slack_is_that_of_the_requests_own_targets_in_the_middle_of_a_jump_too() -> None:
    requests = (
        RequestSpec(10, 100, tpot_slo_s=0.5),
        RequestSpec(10, 100, 0.1, tpot_slo_s=0.02),
        RequestSpec(10, 5, 0.45),
    )
    found = []
    for jump in (True, False):
        case = Case((InstanceSpec(Role.MIXED, 0, 4096),), requests)
        state, sim = case.build(fast_forward=jump)
        Driver(case, state, sim).step(3)
        found.append(sim.candidates[0, Col.MIN_SLACK_S])
    assert found[0] == found[1] == pytest.approx(0.44)


@settings(max_examples=200)
@given(cases())
def test_a_run_cut_at_its_horizon_has_the_same_timeline_either_way(case: Case) -> None:
    jumped, jump_sim = played(case, horizon_s=0.7)
    stepped, step_sim = played(case, horizon_s=0.7, fast_forward=False)
    for name in ("generated", "first_token", "last_token", "finished", "state"):
        np.testing.assert_array_equal(jumped.req[name], stepped.req[name], err_msg=name)
    np.testing.assert_array_equal(jumped.itl, stepped.itl)
    assert jumped.cluster["tokens_out"] == stepped.cluster["tokens_out"]


@settings(max_examples=50)
@given(cases())
def test_without_a_horizon_a_run_ends_by_itself_with_the_same_bytes(case: Case) -> None:
    (a, _), (b, _) = played(case), played(case, horizon_s=0.0)
    a.cluster["horizon_ticks"] = b.cluster["horizon_ticks"]
    assert_same_bytes((a, _), (b, _))


@pytest.mark.parametrize("name", list_scenarios())
def test_every_rule_on_every_bundled_scenario_sees_the_same_world_either_way(name: str) -> None:
    scenario = Scenario.load(name)
    setting = arena_of(scenario).setting
    for rule in registry.names():
        try:
            policy = load_policy(rule, setting)
        except SlalomError:
            continue  # it needs levers or SM shares that this scenario lacks
        runs = [
            simulate(
                scenario, policy, rate=1.3 * scenario.reference_rate, n_requests=60, seed=3,
                split="train", jitter=True, fast_forward=jump,
            )
            for jump in (True, False)
        ]  # fmt: skip
        for field in runs[0].req.dtype.names or ():
            np.testing.assert_array_equal(runs[0].req[field], runs[1].req[field], err_msg=f"{rule}: {field}")
        np.testing.assert_array_equal(runs[0].itl, runs[1].itl, err_msg=rule)
        assert runs[0].cluster["tokens_out"] == runs[1].cluster["tokens_out"]
        assert runs[0].decisions == runs[1].decisions


@kernel
def _twice(number):
    return 2 * number


def test_threads_that_use_the_core_first_at_once_make_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2)

    def on_disk(*given: object) -> bool:
        with suppress(threading.BrokenBarrierError):  # nobody comes where one is made to wait
            together.wait(0.3)
        return True

    monkeypatch.setattr("env.surrogate.compiled.is_compiled", on_disk)
    with ThreadPoolExecutor(2) as threads:
        made = [threads.submit(compiled, _twice, numba.int64) for _ in range(2)]
        assert [future.result()(4) for future in made] == [8, 8]
