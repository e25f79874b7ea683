"""A scenario on the real engine: the same requests, policies and records, played open-loop in real time.

The engine runs in this process, on CUDA where there is a device and else on the CPU with a small model; what it
ran on is part of every result. A request is sent at its time whether or not earlier ones were answered (sessions
send a turn after the one before), and how late the client was is reported, so that a slow client cannot pass for
a fast engine. Not yet verified on a GPU.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import torch

from engine.calibration.bench import warm_up
from engine.calibration.probe import StepProbe
from engine.core.policy import Policy
from engine.core.setup import InstanceSpec
from engine.core.state import ClusterState
from engine.errors import SlalomError
from engine.live.engine import Engine, build_state
from engine.live.request import Delta, Ticket
from engine.model import SamplingParams, load_model, load_tokenizer
from env.live.client import DRAIN_S, Client, EngineRun, play, said_of, targets_of
from env.scenario import Scenario
from env.surrogate.arena import arena_of, build_trace, check_classes
from env.surrogate.simulate import bind_policy
from env.workload import Trace


def _ignore(delta: Delta) -> None:
    """Nobody listens: the engine's own stamps are the record."""


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


def park_for(scenario: Scenario, model: str = "") -> Park:
    """The park that ``scenario`` runs on: of ``model``, or of the model of its profile.

    :raises SlalomError: none is named, and the profile is of another engine
    """
    named, dtype = (model, "auto") if model else model_of(scenario)
    return park_of(named, dtype=dtype)


def engine_state(scenario: Scenario, specs: Sequence[InstanceSpec], n_requests: int, hashing: bool) -> ClusterState:
    """The scenario's cluster as a live engine's: slots for requests that come and go.

    :raises SlalomError: it has routers, or states that are known late
    """
    scenario.check_live()
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
    park = park or park_for(scenario)
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
    client = Client(trace, engine.vocab_size)

    def send(row: int, prompt: list[int]) -> Ticket:
        params = SamplingParams(temperature=0.0, max_tokens=int(trace.output[row]), ignore_eos=True)
        return engine.submit(prompt, params, _ignore, cls=int(trace.cls[row]), **targets_of(trace, row))

    watch(engine)
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        run = play(engine, client, send, drain_s, device=park.name, **said_of(scenario, rate, seed))
    finally:
        gc.enable()
        gc.unfreeze()
    return replace(run, events=len(probe.steps), steps=tuple(probe.steps), transfers=tuple(probe.transfers))


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
