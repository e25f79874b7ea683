"""What the live scheduler costs: per iteration with 64 requests decoding, per placement among 16 instances.

The runtime is the one that serves; the instances compute nothing, so what is left is scheduling: settling, writing
down the step for the lane (tokens and block tables), booking its 64 tokens and handing them to their callers. What
the lane's own thread does around the model (laying out the batch, sampling parameters, text of the tokens) is a
figure of its own: work moved there would show.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.core.kinds import Role
from engine.core.setup import InstanceSpec, LinkSpec, SloClass
from engine.core.state import ClusterState
from engine.kernels import Batch
from engine.latency import Profile, pack
from engine.live.clock import Event, WallClock
from engine.live.engine import Engine, build_state
from engine.live.hosts import local_hosts
from engine.live.request import Delta
from engine.live.steps import Step
from engine.model import SamplingParams, load_model, load_tokenizer
from policies.load import load_policy
from policies.setting import Setting

BATCH = 64
INSTANCES = 16
PROMPT = 128
ITERATIONS = 1000
PLACEMENTS = 2000
RULES = ("least_tokens", "predicted_ttft")


class _Still:
    """An executor that lays out the batch as every other, and answers every sequence with the same token."""

    n_layers = 1
    logprobs: Sequence[Any] = ()
    prompt_logprobs: Sequence[Any] = ()

    def partition(self, state: ClusterState, i: int, l: int) -> int:
        return -1

    def run(self, spans: Any, layers: Any, params: Sequence[SamplingParams], steps: Any, partition: int) -> list[int]:
        Batch.build(spans, block_tokens=16)
        return [65] * len(params)


class _StillHost:
    def __init__(self, host: Any) -> None:
        self.pool, self.watch, self.close = host.pool, host.watch, host.close

    def executor(self, l: int) -> _Still:
        return _Still()


class _HandClock(WallClock):
    """A wall clock whose events are taken by hand, so that this thread can time each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.posted: list[Event] = []

    def post(self, slot: int, outcome: Any = None) -> None:
        self.posted.append(Event(slot, outcome))


class _Bench:
    """An engine whose loop this thread plays; lanes answer at once."""

    def __init__(self, instances: int, rule: str, *, slots: int) -> None:
        model, tokenizer = load_model("dummy:tiny"), load_tokenizer("dummy:tiny")
        specs = [InstanceSpec(Role.MIXED, i, 131072, link=i, max_batch=BATCH) for i in range(instances)]
        state = build_state(
            specs, *pack([Profile.load("llama-8b-h100")]), classes=[SloClass(2.0, 0.1)],
            links=[LinkSpec() for _ in specs], max_requests=slots,
        )  # fmt: skip
        small = build_state(
            [InstanceSpec(Role.MIXED, i, 512, link=i) for i in range(instances)],
            *pack([Profile.load("llama-8b-h100")]), classes=[SloClass(2.0, 0.1)], links=[LinkSpec() for _ in specs],
        )  # fmt: skip
        hosts = [_StillHost(host) for host in local_hosts(model, small, tokenizer.eos_ids)]
        self.engine = Engine(model, tokenizer, state, load_policy(rule, Setting.of_state(state)), hosts=hosts)
        self.clock = self.engine.clock = _HandClock()
        self.engine.instances._clock = self.engine.runtime.clock = self.clock
        self.heard = 0
        self.waiting: list[tuple[int, Step]] = []
        for k, lane in enumerate(self.engine.instances._lanes):
            lane.run = lambda step, k=k: self.waiting.append((k, step))  # type: ignore[method-assign, misc]

    def submit(self, rng: np.random.Generator, tokens: int) -> None:
        prompt = rng.integers(0, 256, PROMPT).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        self.engine.submit(prompt, params, self._hear)

    def _hear(self, delta: Delta) -> None:
        self.heard += 1

    def answer(self) -> tuple[float, float]:
        """Take what was posted, let every lane answer, settle; seconds of the scheduler's thread, of the lanes'."""
        lanes, runtime = self.engine.instances._lanes, self.engine.runtime
        events, self.clock.posted = self.clock.posted, []
        steps, self.waiting = self.waiting, []
        lane_begin = time.perf_counter()
        events += [Event(k, lanes[k].runner.run(step)) for k, step in steps]  # a lane's own thread does this
        begin = time.perf_counter()
        for event in events:
            self.clock.now = self.clock.read()
            runtime._handle(event.slot, event.outcome)
            runtime._settle()
        return time.perf_counter() - begin, begin - lane_begin


def _full() -> _Bench:
    """One instance with a full decode batch."""
    bench, rng = _Bench(1, "least_tokens", slots=2 * BATCH), np.random.default_rng(0)
    for _ in range(BATCH):
        bench.submit(rng, ITERATIONS + 200)
    while int(bench.engine.state.inst[0]["run_n"]) < BATCH:
        bench.answer()
    return bench


def _iteration() -> dict[str, dict[str, float]]:
    """Microseconds of one iteration with a full decode batch: in the scheduler's thread, and in the lane's."""
    bench = _full()
    for _ in range(50):
        bench.answer()
    heard = bench.heard
    spent = np.array([bench.answer() for _ in range(ITERATIONS)]) * 1e6
    assert bench.heard - heard == BATCH * ITERATIONS, "a token got lost"
    return {"iteration_us": _quantiles(spent[:, 0]), "lane_us": _quantiles(spent[:, 1])}


def _core_iteration() -> dict[str, float]:
    """Microseconds of what the compiled core does of it: plan and book one decode step."""
    from engine.core import loop
    from engine.jit.rows import addresses

    bench = _full()
    words, started = addresses(bench.engine.state), np.zeros(16, np.int32)
    spent = []
    for k in range(ITERATIONS // 2):
        begin = time.perf_counter()
        loop.finish_lane(words, 0, 0, bench.clock.now + 1000 * k)
        loop.start_idle(words, bench.clock.now + 1000 * k, started)
        spent.append((time.perf_counter() - begin) * 1e6)
    return _quantiles(np.array(spent[50:]))


def _placement(rule: str) -> dict[str, float]:
    """Microseconds to describe, decide and carry out one placement, with load on every instance."""
    bench, rng = _Bench(INSTANCES, rule, slots=PLACEMENTS + 256), np.random.default_rng(0)
    for _ in range(8 * INSTANCES):
        bench.submit(rng, 2000)
    for _ in range(40):
        bench.answer()
    runtime, spent = bench.engine.runtime, []
    for _ in range(PLACEMENTS):
        bench.submit(rng, 16)
        for event in bench.clock.posted:
            runtime._handle(event.slot, event.outcome)
        bench.clock.posted = []
        begin = time.perf_counter()
        runtime._decide(bench.clock.now)
        spent.append((time.perf_counter() - begin) * 1e6)
    return _quantiles(np.array(spent[100:]))


def _quantiles(us: np.ndarray) -> dict[str, float]:
    found = {name: round(float(np.quantile(us, q)), 2) for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
    return found | {"mean": round(float(us.mean()), 2)}


def run() -> dict[str, Any]:
    """Microseconds: an iteration (bar 50), its compiled part, what the lane adds to a step; a placement (bar 20)."""
    return {
        **_iteration(),
        "core_iteration_us": _core_iteration(),
        "batch": BATCH,
        "placement_us": {rule: _placement(rule) for rule in RULES},
        "instances": INSTANCES,
    }
