"""The live engine on the tiny random model: whatever is done to a request, its greedy tokens stay the same."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from live_cases import GREEDY, KV, MODEL, PROMPTS, TOKENIZER, Caller, Ends, FirstAllowed, engine_on, mixed, send, tables
from runtime_cases import RandomPolicy
from waiting import until

from engine.core.columns import Kind
from engine.core.kinds import Batching, RequestState, Role
from engine.core.setup import ClusterOptions, InstanceSpec, SloClass
from engine.errors import SlalomError
from engine.live.clock import WallClock
from engine.live.door import Overloaded, Unavailable
from engine.live.engine import Engine, build_state
from engine.live.steps import LaneRunner
from engine.model import Batch, KVPool, ModelRunner, SamplingParams, Span


def alone(prompt: list[int], params: SamplingParams) -> list[int]:
    """Greedy tokens of ``prompt`` by the bare model, one request at a time, whole prompt first."""
    runner = ModelRunner(MODEL, KVPool(MODEL.config, blocks=32, block_tokens=16))
    tokens, done = list(prompt), 0
    while len(tokens) < len(prompt) + params.max_tokens:
        batch: Batch = runner.batch([Span(tokens[done:], done, list(range(32)))])
        done = len(tokens)
        tokens += runner.run(batch, [params], [len(tokens) - len(prompt)])
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    return [alone(prompt, GREEDY) for prompt in PROMPTS]


CUTS: dict[str, list[InstanceSpec]] = {
    "whole prompts": mixed(batching=Batching.PREFILL_FIRST),
    "chunked": mixed(chunk_tokens=24),
    "preempted": mixed(kv_tokens=304, chunk_tokens=32),
    "two mixed": mixed(2),
    "migrated by copy": [InstanceSpec(Role.PREFILL, 0, KV), InstanceSpec(Role.DECODE, 1, KV, link=1)],
    "migrated in place": [InstanceSpec(Role.PREFILL, 0, KV), InstanceSpec(Role.DECODE, 0, KV)],
    "multiplexed, layer slices": mixed(role=Role.MULTIPLEXED, batching=Batching.LAYERED),
    "multiplexed, chunks": mixed(role=Role.MULTIPLEXED, chunk_tokens=24),
}


@pytest.mark.parametrize("cut", CUTS)
def test_greedy_tokens_are_the_same_however_a_request_is_cut_up(cut: str, plain: list[list[int]]) -> None:
    with engine_on(CUTS[cut]) as engine:
        for _ in range(2):  # the second time from the prefix cache
            callers = [send(engine, prompt) for prompt in PROMPTS]
            assert [caller.wait().tokens for caller in callers] == plain
            assert {caller.finish for caller in callers} == {"length"}
        cluster = engine.state.cluster[0]
        if cut == "preempted":
            assert cluster["n_preempted"] > 0
        else:
            assert callers[-1].request is not None
            assert callers[-1].request.cached_tokens == 192
        assert (cluster["n_migrated"] > 0) == (cut == "migrated by copy")


def test_layer_slices_really_are_slices(monkeypatch: pytest.MonkeyPatch, plain: list[list[int]]) -> None:
    slices = []
    run = LaneRunner.run
    monkeypatch.setattr(LaneRunner, "run", lambda self, step: (slices.append(step.layers), run(self, step))[1])
    with engine_on(CUTS["multiplexed, layer slices"]) as engine:
        first = send(engine, PROMPTS[0], replace(GREEDY, max_tokens=200))
        until(lambda: len(first.tokens) > 2)
        assert send(engine, PROMPTS[5]).wait().tokens == plain[5]
        first.wait()
    assert any(end - begin < MODEL.config.n_layers for begin, end in slices)


@pytest.mark.parametrize("seed", range(4))
def test_random_answers_role_changes_and_reuse_of_slots_lose_nothing(seed: int, plain: list[list[int]]) -> None:
    specs = [
        InstanceSpec(Role.PREFILL, 0, 1024),
        InstanceSpec(Role.DECODE, 1, 1024, link=1, max_batch=3),
        InstanceSpec(Role.MIXED, 2, 1024, link=2, chunk_tokens=40, max_batch=4),
        InstanceSpec(Role.MULTIPLEXED, 2, 1024, link=3, chunk_tokens=40),
    ]
    options = ClusterOptions(
        hold=True, place_decode=True, reallocate=True, tune=True, hold_s=0.002, control_s=0.01, hold_limit_s=0.2
    )
    with engine_on(specs, policy=RandomPolicy(seed), options=options, max_requests=12) as engine:
        for _ in range(3):
            callers = [send(engine, prompt) for prompt in PROMPTS * 2]
            assert [caller.wait().tokens for caller in callers] == plain * 2
        assert engine.runtime.decisions[Kind.REALLOCATE.name.lower()] > 0


def test_sampling_follows_the_seed_and_stops_where_told() -> None:
    drawn = SamplingParams(temperature=1.0, seed=7, max_tokens=16, ignore_eos=True)
    with engine_on(mixed()) as engine:
        callers = [send(engine, PROMPTS[3], drawn) for _ in range(3)]
        assert len({tuple(c.wait().tokens) for c in callers}) == 1
        tokens = callers[0].tokens
        cut = send(engine, PROMPTS[3], replace(drawn, stop_token_ids=(tokens[5],))).wait()
        assert (cut.tokens, cut.finish) == (tokens[: tokens.index(tokens[5]) + 1], "stop")
        late = send(engine, PROMPTS[3], replace(drawn, stop_token_ids=(tokens[0],), min_tokens=3)).wait()
        assert len(late.tokens) >= 3
        word = TOKENIZER.decode([tokens[2]])
        by_text = send(engine, PROMPTS[3], replace(drawn, stop=(word,))).wait()
        assert by_text.finish == "stop"
        assert word not in by_text.text
        assert engine.state.cluster[0]["n_done"] == 6


def test_answers_end_where_the_memory_does() -> None:
    with engine_on(mixed(kv_tokens=64)) as engine:
        caller = send(engine, PROMPTS[3], replace(GREEDY, max_tokens=500)).wait()
        assert (len(caller.tokens), caller.finish) == (63 - 33, "length")
        with pytest.raises(SlalomError, match="63 tokens"):
            send(engine, PROMPTS[4])
        for bad in ([], [512], [-1]):
            with pytest.raises(SlalomError, match="prompt"):
                send(engine, bad)
        with pytest.raises(SlalomError, match="class"):
            send(engine, PROMPTS[0], cls=1)
        with pytest.raises(SlalomError, match="ttft"):
            send(engine, PROMPTS[0], ttft_s=float("nan"))


def test_own_targets_and_stamps_reach_the_record() -> None:
    seen: list[Any] = []
    with engine_on(mixed()) as engine:
        engine.observers.append(Ends(lambda request, record, finish: seen.append(record.copy())))
        send(engine, PROMPTS[1], ttft_s=0.25, tpot_s=0.03).wait()
        until(lambda: len(seen) == 1)
    record = seen[0]
    assert (record["ttft_slo"], record["tpot_slo"]) == (25 * 10**10, 3 * 10**10)
    assert record["arrival"] <= record["placed"] <= record["prefill_start"] < record["first_token"]
    assert record["first_token"] < record["last_token"] <= record["finished"]


def test_timers_that_are_always_due_do_not_starve_what_threads_post_nor_the_other_way() -> None:
    clock = WallClock()
    for k in range(20):
        clock.post(7, k)
    seen = []
    for _ in range(10):
        clock.at(3, 0)
        seen.append(clock.next().slot)
    assert seen.count(3) == seen.count(7) == 5


class Broken:
    """A policy that fails in every way."""

    name, needs, arrangement = "broken", 1, None
    params, memory = np.zeros(1), np.zeros(1)

    def __init__(self) -> None:
        self.asked = 0

    def decide(self, context: Any, candidates: Any, mask: Any, params: Any, memory: Any) -> Any:
        self.asked += 1
        if self.asked % 3 == 0:
            raise ZeroDivisionError("no")
        return (10**6, float("nan"))[self.asked % 2]

    def describe(self) -> dict[str, Any]:
        return {}


def test_a_policy_that_fails_is_answered_for(plain: list[list[int]]) -> None:
    with engine_on(mixed(2), policy=Broken(), options=ClusterOptions(reallocate=True, control_s=0.01)) as engine:
        callers = [send(engine, prompt) for prompt in PROMPTS]
        assert [caller.wait().tokens for caller in callers] == plain
        assert engine.runtime.fallbacks["error"] + engine.runtime.fallbacks["invalid"] == sum(
            engine.runtime.decisions.values()
        )
        assert {int(r) for r in engine.state.inst["role"]} == {int(Role.MIXED)}


def test_clients_that_hang_up_free_their_blocks(plain: list[list[int]]) -> None:
    specs = [InstanceSpec(Role.PREFILL, 0, KV), InstanceSpec(Role.DECODE, 1, KV, link=1)]
    rng = np.random.default_rng(0)
    with engine_on(specs, prefix_cache=False, max_requests=64) as engine:
        callers = [send(engine, PROMPTS[k % 6], replace(GREEDY, max_tokens=200)) for k in range(48)]
        for caller in rng.permutation(np.array(callers, object)):  # some wait, some prefill, move or decode
            assert caller.request is not None
            engine.abort(caller.request)
            until(lambda: bool(callers[0].deltas))
        for caller in callers:
            assert caller.wait().finish in ("abort", "length")
        assert sum(caller.finish == "abort" for caller in callers) > 40
        until(lambda: engine.n_open == 0)
        assert (engine.state.pool["free"] == engine.state.pool["n_blocks"]).all()
        assert send(engine, PROMPTS[4]).wait().tokens == plain[4]


def test_a_failed_step_ends_its_requests_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, plain: list[list[int]]
) -> None:
    broken = threading.Event()
    choose = ModelRunner.choose

    def failing(self: ModelRunner, *args: Any) -> Any:
        if broken.is_set():
            broken.clear()
            raise RuntimeError("out of memory")
        return choose(self, *args)

    monkeypatch.setattr(ModelRunner, "choose", failing)
    with engine_on(mixed()) as engine:
        victim = send(engine, PROMPTS[4], replace(GREEDY, max_tokens=500))
        until(lambda: len(victim.tokens) > 3)
        broken.set()
        assert victim.wait().finish == "error"
        assert send(engine, PROMPTS[4]).wait().tokens == plain[4]


def test_full_draining_and_closed_engines_refuse() -> None:
    with engine_on(mixed(), max_requests=2) as engine:
        long = [send(engine, PROMPTS[0], replace(GREEDY, max_tokens=1000)) for _ in range(2)]
        with pytest.raises(Overloaded):
            send(engine, PROMPTS[0])
        engine.drain()
        with pytest.raises(Unavailable):
            send(engine, PROMPTS[0])
        for caller in long:
            assert caller.request is not None
            engine.abort(caller.request)
        assert [caller.wait().finish for caller in long] == ["abort", "abort"]
        engine.undrain()
        until(lambda: engine.n_open == 0)
        assert len(send(engine, PROMPTS[0]).wait().tokens) == 24


def test_closing_lets_requests_end_and_then_aborts_them() -> None:
    with engine_on(mixed()) as engine:
        short = send(engine, PROMPTS[0])
        endless = send(engine, PROMPTS[1], replace(GREEDY, max_tokens=2000))
        until(lambda: len(short.tokens) > 20)
        assert engine.close(timeout_s=2.0)
        assert short.wait().finish == "length"
        assert endless.wait().finish in ("abort", "length")


class Shedder(Broken):
    """Refuses everybody."""

    name = "shedder"

    def decide(self, context: Any, candidates: Any, mask: Any, params: Any, memory: Any) -> int:
        return len(mask) - 1


def test_when_the_scheduler_fails_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    profile, share = tables()
    state = build_state(mixed(), profile, share, classes=[SloClass(1.0, 0.1)])
    engine = Engine(MODEL, TOKENIZER, state, RandomPolicy(0)).start()
    caller = send(engine, PROMPTS[0], replace(GREEDY, max_tokens=2000))
    until(lambda: bool(caller.deltas))
    late: list[Caller] = []

    def fail(now: int) -> None:
        late.append(send(engine, PROMPTS[1]))  # the scheduler never comes to look at it
        raise ZeroDivisionError

    monkeypatch.setattr(engine.runtime, "_decide", fail)
    assert caller.wait().finish == "error"
    assert late[0].wait().finish == "error"
    until(lambda: not engine.accepting)
    with pytest.raises(Unavailable):
        send(engine, PROMPTS[0])
    with pytest.raises(Unavailable):
        engine.call(lambda: None)
    assert engine.close(timeout_s=20.0)
    assert isinstance(engine.failure, ZeroDivisionError)


def test_shed_requests_hear_so() -> None:
    def slow() -> Any:
        profile, share = tables()
        profile["step_overhead_s"] = 10.0  # by this, no step meets a target of a second
        return profile, share

    long = replace(GREEDY, max_tokens=400)
    with engine_on(mixed(), policy=Shedder(), options=ClusterOptions(shed=True), tables_of=slow) as engine:
        first = send(engine, PROMPTS[0], long)  # the fleet is idle: nobody is refused
        until(lambda: bool(first.deltas))
        caller: Caller = send(engine, PROMPTS[1]).wait()
        assert (caller.tokens, caller.finish) == ([], "shed")
        assert first.wait().finish == "length"


def test_roles_change_while_serving(plain: list[list[int]]) -> None:
    with engine_on(mixed(2)) as engine:
        callers = [send(engine, prompt) for prompt in PROMPTS]
        engine.set_role(0, Role.PREFILL)
        with pytest.raises(SlalomError, match="role"):
            engine.set_role(1, Role.PREFILL)
        assert [caller.wait().tokens for caller in callers] == plain
        until(lambda: int(engine.state.inst[0]["role"]) == Role.PREFILL)
        assert send(engine, PROMPTS[5]).wait().tokens == plain[5]
        assert (engine.state.req["state"] == RequestState.NEW).all()


def test_running_decodes_are_handed_over_with_their_kv(plain: list[list[int]]) -> None:
    """Answers that began on one instance end on others, token for token, and its role changes before they end."""
    options = ClusterOptions(hand_over=True, at_once=2)
    long = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    with engine_on(mixed(3), options=options) as engine:
        calm = [send(engine, prompt, long).wait().tokens for prompt in PROMPTS[:3]]
    with engine_on(mixed(3), options=options, policy=FirstAllowed()) as engine:  # all of them on instance 0
        callers = [send(engine, prompt, long) for prompt in PROMPTS[:3]]
        until(lambda: all(len(caller.tokens) > 3 for caller in callers))
        engine.set_role(0, Role.PREFILL)
        until(lambda: int(engine.state.inst[0]["role"]) == Role.PREFILL)
        assert not any(caller.done.is_set() for caller in callers)
        assert [caller.wait().tokens for caller in callers] == calm
        assert int(engine.state.cluster[0]["n_migrated"]) == 3
        assert int(engine.state.cluster[0]["n_preempted"]) == 0
    assert [tokens[: len(short)] for tokens, short in zip(calm, plain, strict=False)] == plain[:3]


def test_what_a_cpu_cannot_do_is_refused() -> None:
    for changes in ({"role": Role.MULTIPLEXED}, {}):
        profile, share = tables(shares=3)
        share["sms"] *= 1000  # more cores than any machine has
        options = ClusterOptions(reallocate=not changes)
        state = build_state(mixed(**changes), profile, share, classes=[SloClass(1.0, 0.1)], options=options)
        with pytest.raises(SlalomError, match=r"instances\[0\].*cores"):
            Engine(MODEL, TOKENIZER, state, RandomPolicy(0))
    profile, share = tables(layers=7)
    layered = mixed(role=Role.MULTIPLEXED, batching=Batching.LAYERED)
    state = build_state(layered, profile, share, classes=[SloClass(1.0, 0.1)])
    with pytest.raises(SlalomError, match="4 layers"):
        Engine(MODEL, TOKENIZER, state, RandomPolicy(0))


def test_the_memory_of_a_closed_engine_comes_back_without_a_garbage_collection(plain: list[list[int]]) -> None:
    gc.collect()
    gc.disable()
    try:
        with engine_on(mixed(2)) as engine:
            callers = [send(engine, prompt) for prompt in PROMPTS]
            assert [caller.wait().tokens for caller in callers] == plain
            pools = [weakref.ref(host.pool) for host in engine.instances.hosts]
            requests = [weakref.ref(caller.request) for caller in callers]
        del engine, callers
        assert not any(ref() for ref in pools + requests)
    finally:
        gc.enable()
