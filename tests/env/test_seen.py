"""What routers know: states late, their own bookings at once, those of others no sooner than the delay."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest

from engine.core.columns import Col, Ctx, Kind
from engine.core.state import ClusterState
from engine.errors import SlalomError
from engine.jit.rows import addresses
from engine.latency.evaluate import TICKS_PER_S
from env.gym.vector_env import SlalomVecEnv
from env.live.replay import engine_state
from env.scenario import Scenario
from env.surrogate.arena import arena_of, build_trace, horizon_s, seen_in
from env.surrogate.clock import Sim, new_sim
from env.surrogate.compiled import FirstClass
from env.surrogate.seen import PARTS
from env.surrogate.simulate import bind_policy, ready, simulate

CONV = Scenario.load("azure-conv-4xa100")
#: Every placement is an arrival's: no request is held or asked about twice.
PLAIN = CONV.with_overrides({"decisions.hold": False, "decisions.place_decode": False})


def _decisions(scenario: Scenario, policy: str, rate: float, n: int) -> Iterator[tuple[ClusterState, Sim]]:
    """The state after every decision of a run, the Sim with what was shown."""
    bound, trace = bind_policy(policy, scenario), build_trace(scenario, rate, n, 0, "test")
    state = arena_of(scenario).cluster(bound.arrangement, trace, horizon_s(trace))
    sim = new_sim(state, n_roots=trace.n_roots, seen=seen_in(scenario, "test", 0), cells=len(bound.memory))
    run, memory, decide = ready(), bound.memory.copy(), FirstClass(bound.decide)
    words = addresses(state), addresses(sim), sim.context, sim.candidates, sim.mask
    while run(*words, decide, bound.params, memory, int(bound.needs), 1) == 1:
        yield state, sim


@pytest.mark.parametrize("policy", ["least_tokens", "predicted_ttft", "linear_score"])
@pytest.mark.parametrize("name", ["azure-conv-4xa100", "rag-prefix-4xa100"])
def test_the_state_of_a_moment_ago_and_ones_own_bookings_are_the_state(name: str, policy: str) -> None:
    scenario = Scenario.load(name)
    late = scenario.with_overrides({"observation_delay_s": 1e-9})
    now, then = (simulate(s, policy, rate=scenario.reference_rate, n_requests=1000).req for s in (scenario, late))
    assert now.tobytes() == then.tobytes()
    far = scenario.with_overrides({"observation_delay_s": 0.2})
    assert simulate(far, policy, rate=scenario.reference_rate, n_requests=1000).req.tobytes() != now.tobytes()


def test_decode_steps_jumped_over_or_not_a_router_is_shown_the_same() -> None:
    late = CONV.with_overrides({"observation_delay_s": 0.1, "routers": 2})
    jumped, stepped = (
        simulate(late, "linear_score", rate=24.0, n_requests=600, fast_forward=fast).req for fast in (True, False)
    )
    assert jumped.tobytes() == stepped.tobytes()


@pytest.mark.parametrize("routers", [1, 3])
def test_what_is_shown_follows_from_the_stamps_of_the_requests(routers: int) -> None:
    delay = TICKS_PER_S // 2
    late = PLAIN.with_overrides({"observation_delay_s": 0.5, "routers": routers})
    shown = []
    for state, sim in _decisions(late, "least_tokens", rate=24.0, n=600):
        k = len(state.inst)
        columns = sim.candidates[:k, [Col.QUEUE_N, Col.RUN_N]].copy()
        shown.append((int(sim.sim[0]["now"]), int(sim.sim[0]["router"]), int(sim.context[Ctx.REQUEST]), columns))
    req = state.req
    assert (req["n_preempt"] == 0).all()
    router_of = {r: router for _, router, r, _ in shown}
    assert set(router_of.values()) == set(range(routers))
    routed = np.array([router_of[r] for r in range(len(req))])
    others = 0
    for order, (now, router, _, columns) in enumerate(shown):
        step = delay // PARTS
        then = max(now - delay, 0) // step * step
        known = (req["placed"] >= 0) & (req["placed"] < then)
        earlier = np.zeros(len(req), np.bool_)
        earlier[[r for _, _, r, _ in shown[:order]]] = True
        own = earlier & ~known & (routed == router)
        others += int((earlier & ~known & ~own).sum())
        for i in range(4):
            here = req["first_inst"] == i
            queued = here & ((known & (req["first_token"] >= then)) | own)
            running = here & (req["first_token"] < then) & (req["finished"] >= then) & known
            assert columns[i].tolist() == [queued.sum(), running.sum()], (order, i)
    assert (others > 100) == (routers > 1)


def test_hand_overs_are_booked_like_placements() -> None:
    """With a delay longer than the run a router knows an empty cluster, and all that it has done itself."""
    late = Scenario.load("creation-pd-4xa100").with_overrides({"observation_delay_s": 60.0, "routers": 2})
    done: dict[tuple[int, Kind, int], int] = defaultdict(int)
    asked = 0
    for state, sim in _decisions(late, "static_split", rate=40.0, n=300):
        kind, router, r = Kind(int(sim.context[Ctx.KIND])), int(sim.sim[0]["router"]), int(sim.context[Ctx.REQUEST])
        if kind > Kind.PLACE_DECODE:
            continue
        column = Col.QUEUE_N if kind == Kind.PLACE_PREFILL else Col.INBOUND_N
        for i in range(len(state.inst)):
            assert sim.candidates[i, column] == done[router, kind, i]
        done[router, kind, int(state.req[r]["first_inst" if kind == Kind.PLACE_PREFILL else "dest"])] += 1
        asked += kind == Kind.PLACE_DECODE
    assert asked > 100
    assert sim.sim[0]["now"] < 60 * TICKS_PER_S


def test_each_router_counts_for_itself() -> None:
    turns: dict[int, list[int]] = defaultdict(list)
    for state, sim in _decisions(PLAIN.with_overrides({"routers": 2}), "round_robin", rate=10.0, n=200):
        turns[int(sim.sim[0]["router"])].append(int(state.req[int(sim.context[Ctx.REQUEST])]["first_inst"]))
    assert sorted(turns) == [0, 1]
    assert min(len(own) for own in turns.values()) > 70
    for own in turns.values():
        assert own == [k % 4 for k in range(len(own))]


def test_training_draws_what_it_is_told_to_and_other_windows_stay() -> None:
    drawn = CONV.with_overrides({"randomise": {"observation_delay_s": [0.0, 0.5], "routers": [1, 4]}})
    seen = [seen_in(drawn, "train", [seed, 11]) for seed in range(40)]
    assert {(s.delay_s, s.routers) for s in seen} == {(d, n) for d in (0.0, 0.5) for n in (1, 4)}
    assert {(s.delay_s, s.routers) for s in (seen_in(drawn, split, 0) for split in ("valid", "test"))} == {(0.0, 1)}
    late = next(seed for seed, s in enumerate(seen) if s.delay_s > 0 and s.routers > 1)
    told = CONV.with_overrides({"observation_delay_s": 0.5, "routers": 4})
    runs = [simulate(s, "least_tokens", rate=24.0, n_requests=400, seed=late, split="train") for s in (drawn, told)]
    assert runs[0].req.tobytes() == runs[1].req.tobytes()


def test_episodes_of_a_learner_draw_too() -> None:
    drawn = CONV.with_overrides({"randomise": {"observation_delay_s": [0.0, 0.5], "routers": [1, 4]}})
    env = SlalomVecEnv(drawn, 16, groups=16, seed=3, n_requests=50)
    env.reset()
    found = {(int(q.sim[0]["delay_ticks"]) > 0, int(q.sim[0]["routers"])) for q in env.episodes.sims}
    assert found == {(late, n) for late in (False, True) for n in (1, 4)}
    for _ in range(300):
        env.step(env.action_masks().argmax(axis=1))


def test_old_hashes_stand_and_long_runs_refuse_a_delay() -> None:
    assert CONV.with_overrides({"observation_delay_s": 0.0, "routers": 1}).hash() == CONV.hash()
    assert CONV.with_overrides({"routers": 2}).hash() != CONV.hash()
    late = CONV.with_overrides({"observation_delay_s": 0.1})
    with pytest.raises(SlalomError, match="observation_delay_s"):
        simulate(late, "least_tokens", rate=1e-7, n_requests=5)


@pytest.mark.parametrize("field", [{"routers": 2}, {"observation_delay_s": 0.1}])
def test_live_engines_refuse_what_only_the_surrogate_has(field: dict[str, float]) -> None:
    scenario = CONV.with_overrides(field)
    with pytest.raises(SlalomError, match="one router"):
        engine_state(scenario, arena_of(scenario).specs, 8, False)
