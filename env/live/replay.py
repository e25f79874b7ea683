"""A scenario on the real engine: the same requests, policies and records, played open-loop in real time.

The engine runs in this process, on CUDA where there is a device and else on the CPU with a small model; what it
ran on is part of every result. A request is sent at its time whether or not earlier ones were answered (sessions
send a turn after the one before), and how late the client was is reported, so that a slow client cannot pass for
a fast engine. Not yet verified on a GPU.
"""

from __future__ import annotations

import gc
import heapq
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch

from engine.calibration.bench import warm_up
from engine.calibration.probe import StepProbe, StepTrace
from engine.core.kinds import RequestState
from engine.core.policy import Policy
from engine.core.setup import InstanceSpec, blank_requests
from engine.core.state import ClusterState
from engine.errors import SlalomError
from engine.latency.evaluate import TICKS_PER_S
from engine.live.engine import Engine, build_state
from engine.live.request import ABORT, Delta, Request
from engine.model import SamplingParams, load_model, load_tokenizer
from env.scenario import Scenario
from env.surrogate.arena import arena_of, build_trace, check_classes, requests_of
from env.surrogate.simulate import RunResult, bind_policy
from env.workload import Trace

__all__ = ["DRAIN_S", "EngineRun", "Park", "park_of", "replay"]

#: Seconds that requests still open at the last arrival are given, unless the caller says otherwise.
DRAIN_S = 60.0
_LEAD_S = 0.02


@dataclass(frozen=True, eq=False)
class EngineRun(RunResult):
    """A run on the engine.

    :param device: what it ran on, model and precision included
    :param lag_s: float64 (R,), how late the client sent each request; nan for those never sent
    :param steps: every step of every lane
    :param transfers: (blocks, seconds) of every KV transfer
    """

    device: str
    lag_s: np.ndarray
    steps: tuple[StepTrace, ...]
    transfers: tuple[tuple[int, float], ...]


class Park:
    """A loaded model and everything that is warm; runs of one process share it.

    :param model: package:NAME, path or dummy:SHAPE
    :param device: auto, cpu or cuda
    :param dtype: auto, float32, bfloat16 or float16
    """

    def __init__(self, model: str, device: str = "auto", dtype: str = "auto") -> None:
        from engine.calibration.assemble import device_name
        from engine.model.device import choose_device, choose_dtype

        torch.set_num_threads(1)
        place = choose_device(device)
        kind = choose_dtype(dtype, place)
        self.model = load_model(model, device=place, dtype=kind, kernels="auto")
        self.tokenizer = load_tokenizer(model)
        self.name = f"{model} ({str(kind).removeprefix('torch.')}) on {device_name(self.model)} [{place}]"
        self._warm: tuple[int, int] = (0, 0)

    def warm(self, specs: Sequence[InstanceSpec]) -> None:
        """Meet every shape that ``specs`` can form, once, before anything is timed."""
        most = max(spec.max_batch for spec in specs)
        rows = max(max(spec.chunk_tokens, 1) + spec.max_batch for spec in specs)
        rows, most = min(rows, 2048), min(most, 512)
        if rows > self._warm[0] or most > self._warm[1]:
            warm_up(self.model, rows, most)
            self._warm = (rows, most)


@cache
def park_of(model: str, device: str = "auto", dtype: str = "auto") -> Park:
    """The park of a model, loaded once per process."""
    return Park(model, device, dtype)


def model_of(scenario: Scenario) -> tuple[str, str]:
    """(model, dtype) that the scenario's profile was measured on.

    :raises SlalomError: the profile is a published one, of an engine that is not ours
    """
    profile = scenario.load_profiles()[0]
    if not profile.engine.startswith("slalom"):
        fix = "it was not measured on this engine: give --model, or calibrate and name your profile in the scenario"
        raise SlalomError("profile", profile.name, fix)
    return profile.model, profile.engine.rsplit(", ", 1)[-1]


class _Client:
    """Sends the requests of a trace at their times and keeps the record of each that ended."""

    def __init__(self, trace: Trace, vocabulary: int) -> None:
        self._trace = trace
        self.records = blank_requests(trace.n)
        template = requests_of(trace)
        for name in ("prompt", "output", "cls", "ttft_slo", "tpot_slo"):
            self.records[name] = template[name]
        self.lag_s = np.full(trace.n, np.nan)
        self._row: dict[int, int] = {}  # request number -> row
        self._turns: list[tuple[int, int]] = []  # follow-up turns by due time, ns of the clock on the wall
        self._changed = threading.Condition()
        self._open = 0
        self._prompts = [_tokens(trace, r, vocabulary) for r in range(trace.n)]

    def ended(self, request: Request, record: np.void, finish: str) -> None:
        """The engine is done with ``request`` (its thread)."""
        now = time.perf_counter_ns()
        with self._changed:
            row = self._row.pop(request.number)
            self.records[row] = record
            if finish == ABORT:
                self.records[row]["state"] = RequestState.RUNNING  # it was still open when the run ended
            elif record["state"] == RequestState.FINISHED and self._trace.next_turn[row] >= 0:
                think = int(self._trace.think_s[row] * 1e9)
                heapq.heappush(self._turns, (now + think, int(self._trace.next_turn[row])))
            self._open -= 1
            self._changed.notify()

    def send_all(self, engine: Engine, drain_s: float) -> None:
        """Send everything in time and wait for the answers, at most ``drain_s`` after the last arrival."""
        engine.instances.on_end = self.ended
        begin = time.perf_counter_ns() + int(_LEAD_S * 1e9)
        roots = [(begin + int(s * 1e9), r) for r, s in enumerate(self._trace.arrival_s[: self._trace.n_roots])]
        sent, give_up = 0, roots[-1][0] + int(drain_s * 1e9)
        while True:
            with self._changed:
                due = [roots[sent]] if sent < len(roots) else []
                if self._turns:
                    due.append(self._turns[0])
                if (not due and self._open == 0) or time.perf_counter_ns() > give_up:
                    return
                when, row = min(due, default=(give_up, -1))
                wait_s = (when - time.perf_counter_ns()) * 1e-9
                if wait_s > 0:
                    self._changed.wait(min(wait_s, 0.5))
                    continue
                if self._turns and self._turns[0] == (when, row):
                    heapq.heappop(self._turns)
                else:
                    sent += 1
            self._send(engine, row, when)

    def _send(self, engine: Engine, row: int, when_ns: int) -> None:
        trace = self._trace
        output = int(trace.output[row])
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        ttft_s, tpot_s = (float(v[row]) if np.isfinite(v[row]) else None for v in (trace.ttft_s, trace.tpot_s))
        with self._changed:  # ``ended`` waits until the request's row is known
            request = engine.submit(
                self._prompts[row], params, _ignore, cls=int(trace.cls[row]), ttft_s=ttft_s, tpot_s=tpot_s
            )
            self.lag_s[row] = (time.perf_counter_ns() - when_ns) * 1e-9
            self._row[request.number] = row
            self._open += 1


def _ignore(delta: Delta) -> None:
    """Nobody listens: the engine's own stamps are the record."""


def _tokens(trace: Trace, row: int, vocabulary: int) -> list[int]:
    """A prompt of the right length whose blocks agree with those of other rows where the trace says so."""
    n, size = int(trace.prompt[row]), trace.hash_tokens
    tokens = np.random.default_rng([7, row]).integers(1, vocabulary, n)
    if size:
        start = int(trace.hash_start[row])
        for k in range(min(int(trace.hash_n[row]), n // size)):
            seed = int(trace.hashes[start + k])
            tokens[k * size : (k + 1) * size] = np.random.default_rng(seed).integers(1, vocabulary, size)
    return [int(t) for t in tokens]


def engine_state(scenario: Scenario, specs: Sequence[InstanceSpec], n_requests: int, hashing: bool) -> ClusterState:
    """The scenario's cluster as a live engine's: slots for requests that come and go."""
    arena = arena_of(scenario)
    return build_state(
        specs, arena.profile, arena.share, classes=arena.classes, options=arena.options, links=arena.links,
        max_requests=n_requests, prefix_cache=hashing,
    )  # fmt: skip


def check_fits(trace: Trace, engine: Engine) -> None:
    """Refuse a workload with requests this engine cannot hold.

    :raises SlalomError: prompt and answer of some request exceed its room
    """
    longest = int((trace.prompt + trace.output).max())
    if longest > engine.max_tokens:
        fix = f"the engine holds {engine.max_tokens} tokens of a request; raise kv_tokens or set max_context"
        raise SlalomError("workload", f"a request of {longest} tokens", fix)


def replay(
    scenario: Scenario,
    policy: Any,
    *,
    rate: float,
    n_requests: int | None = None,
    seed: int = 0,
    split: Literal["train", "valid", "test"] = "test",
    values: Mapping[str, Any] | None = None,
    trace: Trace | None = None,
    park: Park | None = None,
    drain_s: float = DRAIN_S,
    watch: Callable[[Engine], None] = lambda engine: None,
) -> EngineRun:
    """Serve the requests that :func:`env.surrogate.simulate.simulate` would, on the engine; parameters as there.

    :param park: the model to serve with; that of the scenario's profile if not given
    :param drain_s: requests still open this long after the last arrival are cut off and count as unfinished
    :param watch: gets the engine before it starts
    :raises SlalomError: bad rate, a policy or workload that does not fit, a profile of another engine
    """
    if not rate > 0:
        raise SlalomError("rate", rate, "give a positive number of requests per second")
    park = park or park_of(model_of(scenario)[0], "auto", model_of(scenario)[1])
    arena = arena_of(scenario)
    bound: Policy = bind_policy(policy, scenario, values)
    if trace is None:
        trace = build_trace(scenario, rate, n_requests or scenario.n_requests, seed, split)
    check_classes(trace, len(scenario.classes))
    specs = arena.arranged(bound.arrangement)
    park.warm(specs)
    _scratch(scenario, park, bound, specs)
    state = engine_state(scenario, specs, trace.n, trace.hash_tokens > 0)
    state.cluster["hash_tokens"] = 16 if trace.hash_tokens else 0
    engine = Engine(park.model, park.tokenizer, state, bound)
    check_fits(trace, engine)
    probe = StepProbe(engine)
    client = _Client(trace, engine.vocab_size)
    watch(engine)
    gc.collect()
    gc.freeze()
    gc.disable()
    begin, decided = time.perf_counter(), engine.runtime.decisions
    zero = engine.clock.read()
    try:
        engine.start()
        client.send_all(engine, drain_s)
        with suppress(Exception):
            engine.call(lambda: engine.instances.doom_all(ABORT))
    finally:
        gc.enable()
        gc.unfreeze()
        engine.close(timeout_s=10.0)
    if engine.failure is not None:
        raise RuntimeError("the engine failed while it replayed the scenario") from engine.failure
    end = engine.clock.read()
    return EngineRun(
        req=_from_zero(client.records, zero), cluster=state.cluster[0], inst=state.inst, cls=state.cls, itl=state.itl,
        class_names=tuple(c.name for c in scenario.classes), n_gpus=scenario.n_gpus(),
        duration_s=(end - zero) / TICKS_PER_S, wall_s=time.perf_counter() - begin,
        decisions=sum(decided.values()), events=len(probe.steps), rate=rate, seed=seed, policy=bound.name,
        scenario=scenario.name, device=park.name, lag_s=client.lag_s, steps=tuple(probe.steps),
        transfers=tuple(probe.transfers),
    )  # fmt: skip


def _from_zero(records: np.ndarray, zero: int) -> np.ndarray:
    """Stamps counted from the start of the run, as the surrogate's are."""
    for name in ("arrival", "placed", "prefill_start", "first_token", "last_token", "finished"):
        happened = records[name] >= 0
        records[name][happened] -= zero
    return records


_SCRATCHED: set[tuple[str, str]] = set()


def _scratch(scenario: Scenario, park: Park, bound: Policy, specs: Sequence[InstanceSpec]) -> None:
    """Serve a few requests on a small engine, so that the scheduler's code and the policy's are compiled."""
    key = (scenario.hash(), bound.name)
    if key in _SCRATCHED:
        return
    small = [replace(spec, kv_tokens=256) for spec in specs]
    engine = Engine(park.model, park.tokenizer, engine_state(scenario, small, 8, False), bound).start()
    left = threading.Semaphore(0)

    def sink(delta: Delta) -> None:
        if delta.finish is not None:
            left.release()

    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    for _ in range(4):
        engine.submit([1] * 24, params, sink)
    for _ in range(4):
        left.acquire(timeout=60.0)
    engine.close()
    _SCRATCHED.add(key)
