"""The engine's runtime with modelled instances is the surrogate, bit for bit; and its books survive any abort."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_cases import RandomPolicy, crowded_cluster, random_cluster

from engine.core.events import interrupt
from engine.core.events.slots import slots_of
from engine.core.kinds import RequestState
from engine.core.state import ClusterState
from engine.errors import SlalomError
from engine.jit.rows import addresses
from engine.live.clock import VirtualClock
from engine.live.integrity import faults
from engine.live.modelled import ModelledInstances, play
from engine.live.runtime import Runtime
from env.scenario import Scenario, list_scenarios
from env.surrogate.arena import arena_of, build_trace, horizon_s, jittered
from env.surrogate.clock import new_sim
from env.surrogate.compiled import POLICY_ARGS, WORDS, FirstClass, compiled
from env.surrogate.loop import run
from env.surrogate.simulate import bind_policy
from policies.registry import names


def simulate(state: ClusterState, policy: Any, n_roots: int, fast_forward: bool, truth: dict[str, np.ndarray]) -> None:
    sim = new_sim(state, n_roots=n_roots, fast_forward=fast_forward, **truth)
    decide = compiled(run, WORDS, WORDS, *POLICY_ARGS, numba.float64[::1], numba.int64, numba.int64)
    decide(
        addresses(state), addresses(sim), sim.context, sim.candidates, sim.mask,
        FirstClass(policy.decide), policy.params, policy.memory.copy(), int(policy.needs) | 1, 0,
    )  # fmt: skip


def differences(ours: ClusterState, theirs: ClusterState, but: tuple[str, ...] = ()) -> list[str]:
    """Fields in which two clusters differ."""
    return [
        f"{table}.{name}"
        for table in ("req", "cluster", "inst", "cls", "link", "pool")
        for name in getattr(ours, table).dtype.names
        if f"{table}.{name}" not in but and not np.array_equal(getattr(ours, table)[name], getattr(theirs, table)[name])
    ] + ([] if np.array_equal(ours.itl, theirs.itl) else ["itl"])


#: The planner is asked once for a jump over many steps, so it counts fewer of them.
COUNTS = ("cluster.steps", "inst.steps", "inst.unbooked")


@given(seed=st.integers(0, 10**6))
@settings(max_examples=120, deadline=None, derandomize=True)
def test_random_clusters_have_the_timeline_of_the_surrogate(seed: int) -> None:
    policy = RandomPolicy(seed)
    (stepping, n_roots), (jumping, _), (ours, _) = (random_cluster(seed) for _ in range(3))
    truth = dict(jittered(stepping, 0.2, np.random.default_rng(seed))) if seed % 2 else {}
    simulate(stepping, policy, n_roots, False, truth)
    simulate(jumping, policy, n_roots, True, truth)
    runtime = play(ours, policy, n_roots=n_roots, **truth)
    assert not runtime.fallbacks
    assert differences(ours, stepping) == []
    # With a prefix cache, sequences that end within jumps of several lanes give blocks back in another order.
    if not ours.cluster[0]["hash_tokens"]:
        assert differences(ours, jumping, but=COUNTS) == []
    assert faults(ours) == []


@given(seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_prefills_that_stand_aside_have_the_timeline_of_the_surrogate(seed: int) -> None:
    policy = RandomPolicy(seed)
    (stepping, n_roots), (jumping, _), (ours, _) = (crowded_cluster(seed) for _ in range(3))
    simulate(stepping, policy, n_roots, False, {})
    simulate(jumping, policy, n_roots, True, {})
    play(ours, policy, n_roots=n_roots)
    assert differences(ours, stepping) == []
    if not ours.cluster[0]["hash_tokens"]:
        assert differences(ours, jumping, but=COUNTS) == []
    assert faults(ours) == []
    assert ours.cluster[0]["n_done"] == ours.cluster[0]["n_sent"] > 0


def test_in_crowded_clusters_prefills_do_stand_aside() -> None:
    aside = 0
    for seed in range(60):
        state, n_roots = crowded_cluster(seed)
        play(state, RandomPolicy(seed), n_roots=n_roots)
        aside += bool(state.inst["stood_aside"].any())
    assert aside >= 10, aside


def test_random_clusters_are_worth_the_name() -> None:
    seen: Counter[str] = Counter()
    for seed in range(40):
        state, n_roots = random_cluster(seed)
        play(state, RandomPolicy(seed), n_roots=n_roots)
        for name in ("n_finished", "n_shed", "n_preempted", "n_migrated", "n_switches", "cached_tokens"):
            seen[name] += int(state.cluster[0][name]) > 0
    assert min(seen.values()) >= 3, seen


@pytest.mark.parametrize("name", list_scenarios())
def test_rules_have_the_timeline_of_the_surrogate(name: str) -> None:
    scenario = Scenario.load(name)
    trace = build_trace(scenario, scenario.reference_rate, 60, 11, "test")
    compared = 0
    for rule in names():
        try:
            policy = bind_policy(rule, scenario)
        except SlalomError:
            continue  # a rule may need levers that this scenario does not have
        compared += 1
        ours, stepping, jumping = (
            arena_of(scenario).cluster(policy.arrangement, trace, horizon_s(trace)) for _ in range(3)
        )
        simulate(stepping, policy, trace.n_roots, False, {})
        simulate(jumping, policy, trace.n_roots, True, {})
        play(ours, policy, n_roots=trace.n_roots)
        assert differences(ours, stepping) == [], rule
        assert differences(ours, jumping, but=COUNTS) == [], rule
        assert ours.cluster[0]["n_done"] == ours.cluster[0]["n_sent"] > 0
    assert compared >= 6


@pytest.mark.parametrize("policy", ["planner", "planner:side=multiplexed,start=0.8"])
def test_a_planner_changes_roles_at_the_same_times_as_in_the_surrogate(policy: str) -> None:
    """A day and a night of two minutes each, twice: decodes are handed over, several instances change at once."""
    scenario = Scenario.load("daynight-70b").with_overrides({"workload.duration_s": 480.0, "control_interval_s": 0.5})
    trace = build_trace(scenario, 4.0, 1920, 1, "test")
    bound = bind_policy(policy, scenario)
    ours, stepping, jumping = (arena_of(scenario).cluster(bound.arrangement, trace, horizon_s(trace)) for _ in range(3))
    simulate(stepping, bound, trace.n_roots, False, {})
    simulate(jumping, bound, trace.n_roots, True, {})
    play(ours, bound, n_roots=trace.n_roots)
    assert differences(ours, stepping) == []
    assert differences(ours, jumping, but=COUNTS) == []
    assert ours.cluster[0]["n_switches"] >= 8
    assert ours.cluster[0]["n_finished"] == trace.n


class Vandal(ModelledInstances):
    """Hangs up on requests and breaks transfers at random boundaries, as the live engine's callers may."""

    def __init__(self, *args: Any, seed: int) -> None:
        super().__init__(*args)
        self.rng = np.random.default_rng(seed)
        self.doomed: set[int] = set()
        self.lost: list[tuple[int, int, int]] = []
        self.aborted: Counter[RequestState] = Counter()
        self.late: Counter[RequestState] = Counter()
        self.failed_transfers = 0

    def _vandalise(self) -> None:
        if self.rng.random() < 0.15:
            alive = np.flatnonzero((self._state.req["state"] > 0) & (self._state.req["state"] < 10))
            if len(alive):
                self.doomed.add(int(self.rng.choice(alive)))
        for r in list(self.doomed):
            before = RequestState(int(self._state.req[r]["state"]))
            if interrupt.abort(self._words, r, self._clock.now):
                self.doomed.remove(r)
                self.aborted[before] += 1
            else:
                self.late[before] += 1

    def settled(self) -> None:
        super().settled()
        if self.lost and self.rng.random() < 0.5:
            interrupt.release_blocks(self._words, *self.lost.pop())

    def lane_ends(self, i: int, l: int, outcome: Any) -> None:
        super().lane_ends(i, l, outcome)
        self._vandalise()

    def arrives(self, outcome: Any) -> None:
        super().arrives(outcome)
        self._vandalise()

    def link_ends(self, link: int, outcome: Any) -> None:
        if self.rng.random() < 0.3:
            self.failed_transfers += 1
            lists = self._state.lists
            head = lists[len(lists) - len(self._state.link) + link, 0]
            receiver = int(self._state.req[head]["dest"])
            lose = bool(self.rng.random() < 0.5)
            tail, n, starts = interrupt.fail_transfer(self._words, link, lose)
            assert (n > 0) == lose
            self.lost += [(receiver, tail, n)] if lose else []
            if starts:
                self.start_link(link)
        else:
            super().link_ends(link, outcome)
        self._vandalise()


def test_aborts_and_broken_transfers_give_every_block_back() -> None:
    aborted: Counter[RequestState] = Counter()
    late: Counter[RequestState] = Counter()
    failed = 0
    for seed in range(190):
        state, n_roots = random_cluster(seed) if seed < 150 else crowded_cluster(seed)
        clock = VirtualClock(slots_of(len(state.inst), len(state.link)).total, int(60e12))
        vandal = Vandal(state, clock, n_roots, seed=seed)
        runtime = Runtime(state, RandomPolicy(seed), vandal, clock)
        runtime.run()
        for lost in vandal.lost:
            interrupt.release_blocks(runtime.words, *lost)
        assert state.cluster[0]["n_done"] == state.cluster[0]["n_sent"], f"seed {seed} is stuck"
        assert faults(state) == [], f"seed {seed}"
        aborted, late = aborted + vandal.aborted, late + vandal.late
        failed += vandal.failed_transfers
    waiting = {"HELD", "WAITING", "INBOUND", "MOVING", "READY", "RUNNING"}
    assert waiting <= {s.name for s in aborted}, aborted
    assert {"PREFILLING", "RUNNING", "MOVING"} <= {s.name for s in late}, late
    assert failed > 10
