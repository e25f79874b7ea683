"""Fidelity: the same requests on both sides, errors and noise told apart; and the engine behind it, on a tiny model."""

import json
import sys
import threading
from collections import defaultdict
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from eval_cases import request

import env  # noqa: F401  (registers the environment)
from engine.core.kinds import RequestState, Role
from engine.errors import SlalomError
from engine.latency import Profile
from engine.live.hosts import LocalExecutor
from env.live.client import EngineRun
from env.live.replay import Engine, Park, model_of, replay
from env.measure.on_engine import engine_facts
from env.scenario import Scenario
from env.surrogate.arena import build_trace
from env.surrogate.simulate import simulate
from eval import cli
from eval.fidelity.fidelity import fidelity, keep_in_profile, observed, stored_form

POLICIES = ["round_robin", "least_tokens", "static_split"]


@pytest.fixture(scope="module")
def scenario(tmp_path_factory):
    """The CPU scenario on the tiny random model: same shape of problem, steps of a millisecond or two."""
    path = tmp_path_factory.mktemp("profiles") / "tiny.json"
    shipped = Profile.load("smollm2-cpu")
    shares = [
        s.model_copy(
            update={"prefill_s": (0.0, 0.0, 2e-5, 2e-3), "knot_tokens": (), "knot_s": (),
                    "decode_small_s": (1e-7, 1e-4, 2e-3), "decode_large_s": None, "fused_shared_s": 1e-3}
        )
        for s in shipped.shares
    ]  # fmt: skip
    roofline = shipped.roofline.model_copy(update={"params": 1.0, "weight_bytes": 1.0, "memory_bytes_per_s": 1e15})
    shipped.model_copy(
        update={"name": "tiny", "model": "dummy:tiny", "engine": "slalom, float32", "shares": tuple(shares),
                "roofline": roofline, "fidelity": None, "fit": None, "kv_bytes_per_token": 8.0}
    ).save(path)  # fmt: skip
    content = Scenario.load("smollm2-2xcpu").model_dump(mode="json")
    return Scenario.parse(content | {"name": "tinylive", "profile": str(path), "rates": {"low": 1.0, "high": 900.0}})


@pytest.fixture(scope="module")
def park():
    return Park("dummy:tiny", "cpu", "float32")


def test_the_engine_serves_the_very_requests_that_the_surrogate_would(scenario, park):
    run = replay(scenario, "least_tokens", rate=60.0, n_requests=30, seed=3, park=park)
    trace = build_trace(scenario, 60.0, 30, 3, "test")
    np.testing.assert_array_equal(run.req["prompt"], trace.prompt)
    np.testing.assert_array_equal(run.req["generated"], trace.output)
    assert (run.req["state"] == RequestState.FINISHED).all()
    planned = trace.arrival_s - trace.arrival_s[0]
    sent = (run.req["arrival"] - run.req["arrival"][0]) * 1e-12
    late = run.lag_s
    assert (late >= 0).all()
    # nobody is sent early, the lag says how late; a busy machine may come between the two stamps of a few requests
    apart = (sent - planned) - (late - late[0])
    assert np.median(np.abs(apart - np.median(apart))) < 2e-3
    assert np.abs(apart).max() < 0.05
    assert (run.req["first_token"] > run.req["arrival"]).all()
    assert (run.req["last_token"] >= run.req["first_token"]).all()
    assert sum(s.lane["sum_n"] for s in run.steps) == trace.prompt.sum()
    assert all(s.total_s >= s.run_s > 0 for s in run.steps)
    facts = engine_facts(run)
    assert "dummy:tiny" in facts["device"]
    assert facts["client_lag_ms"]["p99"] >= facts["client_lag_ms"]["median"] >= 0
    json.dumps(facts)


def test_a_hand_over_on_the_engine_is_counted_and_a_request_too_long_is_refused(scenario, park):
    run = replay(scenario, "static_split", rate=60.0, n_requests=10, park=park)
    assert len(run.transfers) == run.cluster["n_migrated"] > 0
    small = scenario.with_overrides({"cluster.0.kv_tokens": 64})
    with pytest.raises(SlalomError, match="kv_tokens"):
        replay(small, "least_tokens", rate=60.0, n_requests=30, park=park)
    with pytest.raises(SlalomError, match="not measured on this engine"):
        model_of(Scenario.load("azure-conv-4xa100"))


def test_the_gym_environment_steps_the_engine(scenario):
    world = gymnasium.make("slalom/Dispatch-v0", scenario=scenario, backend="gpu", n_requests=8, rates=(50.0, 60.0))
    twin = gymnasium.make("slalom/Dispatch-v0", scenario=scenario, n_requests=8, rates=(50.0, 60.0))
    assert world.observation_space == twin.observation_space
    observation, info = world.reset(seed=1)
    assert world.observation_space.contains(observation)
    steps, truncated = 0, False
    while not truncated:
        action = int(np.flatnonzero(info["action_mask"])[0])
        observation, reward, _, truncated, info = world.step(action)
        assert world.observation_space.contains(observation)
        assert reward <= 0.0
        steps += 1
    assert steps >= 7
    assert np.isnan(info["attainment"]) or 0.0 <= info["attainment"] <= 1.0  # NaN: nothing sealed by the last decision
    world.reset()
    world.close()


def test_a_static_plan_brings_its_own_arrangement_to_the_engine(scenario, tmp_path, monkeypatch, capsys):
    """No plan has chunks of 64 tokens, so whatever is found differs from the scenario's own arrangement."""
    own = scenario.with_overrides({"cluster.0.chunk_tokens": 64, "reference_rate": 60.0})
    (tmp_path / "own.yaml").write_text(own.to_yaml())
    ran = []

    class Watched(Engine):
        def __init__(self, model, tokenizer, state, *more, **options):
            ran.append(sorted((Role(i["role"]).name.lower(), int(i["chunk_tokens"])) for i in state.inst))
            super().__init__(model, tokenizer, state, *more, **options)

    monkeypatch.setattr("env.live.replay.Engine", Watched)
    command = "eval-policy --env gpu --policy static_plan --tune 2 --rates 60 --seeds 1 --requests 20 --json"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--scenario", str(tmp_path / "own.yaml")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    result = json.loads(capsys.readouterr().out)
    (found,) = result["settings"]["tuning"]
    plan = sorted((g["role"], g["chunk_tokens"]) for g in found["cluster"] for _ in range(g["count"]))
    assert plan != sorted((g.role, g.chunk_tokens) for g in own.cluster for _ in range(g.count))
    assert ran
    assert all(arrangement == plan for arrangement in ran)
    (policy,) = result["policies"]
    (point,) = policy["points"]
    assert policy["label"] == "static_plan"
    assert point["runs"][0]["backend"] == "gpu"


def test_slowness_grows_when_requests_do_not_finish(make_run):
    """Targets are 100 ms and 10 ms; the run is 1 s long."""
    done = [request(0, 50, 90, out=5)] * 22  # two of them are warm-up
    one_token = [request(0, 50, 50, out=1)] * 20
    begun = [request(0, 50, 90, out=5, state=RequestState.RUNNING)] * 20
    waiting = [request(0, state=RequestState.WAITING, out=0)] * 20
    seen = [observed(make_run(done + more)) for more in (done[2:], begun, waiting, one_token)]
    assert [s["slowness"] for s in seen] == pytest.approx([1.5, 0.5 + (1 + 19) / 2, (0.5 + 10) / 2 + (1 + 10) / 2, 1.5])
    assert set(seen[1]["tpot_ms"]) == {10.0, 190.0}
    assert set(seen[2]["tpot_ms"]) == set(seen[3]["tpot_ms"]) == {10.0}


class Named:
    name = "a machine"


def slower(factor, jitter=0.0):
    """An engine that is the surrogate on steps ``factor`` times as long."""
    rng = np.random.default_rng(0)

    def fake(scenario, policy, *, rate, n_requests, seed, park, drain_s):
        run = simulate(scenario, policy, rate=rate, n_requests=n_requests, seed=seed)
        stretch = factor * (1.0 + jitter * rng.standard_normal())
        for name in ("first_token", "last_token", "finished"):
            run.req[name] = run.req["arrival"] + (stretch * (run.req[name] - run.req["arrival"])).astype(np.int64)
        return EngineRun(**vars(run), device="a machine", lag_s=np.zeros(len(run.req)), steps=(), transfers=())

    return fake


def test_errors_are_the_surrogate_s_and_noise_the_engine_s(scenario, tmp_path):
    args = {"loads": (0.3, 0.6), "repetitions": 3, "run_s": 1.0, "park": lambda s: Named()}
    result = fidelity([scenario], POLICIES, replay=slower(1.25), **args)
    for name in ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p90"):
        assert result["summary"]["errors"][name]["mean_error"] == pytest.approx(-0.2, abs=0.01)
        assert result["summary"]["errors"][name]["noise"] == 0.0
    assert result["summary"]["ranking"]["slowness"]["tau"] == 1.0
    noisy = fidelity([scenario], POLICIES, replay=slower(1.0, 0.05), **args)
    assert 0.01 < noisy["summary"]["errors"]["tpot_p50"]["noise"] < 0.15
    assert noisy["summary"]["ranking"]["slowness"]["engine_against_itself"] is not None
    assert result["summary"]["cases"] == 6
    json.dumps(result)
    written = keep_in_profile([scenario], result)
    assert Profile.load(written[0]).fidelity == stored_form(result)


def test_a_slow_machine_is_told_from_a_wrong_profile(scenario):
    def slow_machine(scenario, policy, *, rate, n_requests, seed, park, drain_s):
        run = simulate(scenario, policy, rate=rate, n_requests=n_requests, seed=seed, slowdown=1.3)
        return EngineRun(**vars(run), device="a machine", lag_s=np.zeros(len(run.req)), steps=(), transfers=())

    result = fidelity(
        [scenario], POLICIES[:2], loads=(0.3, 0.6), repetitions=2, run_s=1.0, park=lambda s: Named(),
        replay=slow_machine, gauge=lambda s: lambda: 1.3,
    )  # fmt: skip
    raw, fair = result["summary"]["errors"], result["at_speed"]["summary"]["errors"]
    assert raw["tpot_p50"]["mean_error"] < -0.2
    assert {name: e["max_abs_error"] for name, e in fair.items()} == dict.fromkeys(fair, 0.0)
    assert result["at_speed"]["slowdown"] == [1.3] * 8


def test_the_gauge_reads_what_reference_steps_take_by_the_profile(scenario, park, monkeypatch):
    from eval.fidelity.gauge import Gauge

    used = defaultdict(set)
    run = LocalExecutor.run

    def watched(self, spans, layers, params, steps, partition):
        used[self._lanes.lane(self._l, partition)].add(threading.get_ident())
        return run(self, spans, layers, params, steps, partition)

    monkeypatch.setattr(LocalExecutor, "run", watched)
    assert 0.01 < Gauge(park.model, scenario, rounds=1).slowdown() < 100.0
    assert [len(threads) for threads in used.values()] == [1] * len(scenario.placements()), "a lane has one thread"


def test_finished_runs_are_read_back(scenario, tmp_path):
    played = []

    def counting(*arguments, **options):
        played.append(options["rate"])
        return slower(1.1)(*arguments, **options)

    args = {"loads": (0.5,), "run_s": 1.0, "park": lambda s: Named(), "out": tmp_path, "replay": counting}
    first = fidelity([scenario], POLICIES[:2], repetitions=2, **args)
    assert len(played) == 4
    again = fidelity([scenario], POLICIES[:2], repetitions=3, **args)
    assert len(played) == 6
    assert again["table"][0]["figures"]["tpot_p50"]["engine"] == first["table"][0]["figures"]["tpot_p50"]["engine"]


def test_domain_randomisation_takes_its_width_from_the_table(scenario):
    from env.surrogate.arena import _jitter

    name = scenario.profile_names()[0]
    profile = Profile.load(name)
    profile.model_copy(update={"fidelity": {"step_spread": 0.17}}).save(name)
    assert _jitter(scenario) == 0.17
    profile.model_copy(update={"fidelity": None}).save(name)
    assert _jitter(scenario) < 0.1


def test_a_run_that_failed_to_end_counts_as_missed(scenario, park):
    run = replay(scenario, "least_tokens", rate=200.0, n_requests=20, park=park, drain_s=0.0)
    open_ones = run.req["state"] != RequestState.FINISHED
    assert replace(run, wall_s=0.0).req is run.req
    assert open_ones.any()
    assert (run.req["state"][open_ones] == RequestState.RUNNING).all() or (run.req["arrival"][open_ones] < 0).any()
