"""A scenario on engines of others, behind the router: the same requests, policies and records, in real time."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from engine.core.kinds import Role
from engine.core.policy import Policy
from engine.core.setup import InstanceSpec
from engine.core.state import ClusterState
from engine.errors import SlalomError
from engine.live.engine import build_state
from engine.live.request import Ticket
from engine.remote.discover import EngineFacts
from engine.remote.fleet import Fleet
from engine.remote.rehearse import rehearse
from engine.remote.router import Router
from env.live.client import DRAIN_S, Client, EngineRun, play, said_of, targets_of
from env.others import misfits
from env.scenario import Scenario
from env.surrogate.arena import Arena, arena_of, build_trace, check_classes
from env.surrogate.simulate import bind_policy
from env.workload import Trace

_VOCABULARY = 10_000  # ids that any model knows
_REHEARSED: set[tuple[str, str]] = set()


def _specs(scenario: Scenario, arena: Arena, bound: Policy, engines: Sequence[EngineFacts]) -> list[InstanceSpec]:
    """The scenario's instances as engines of others.

    :raises SlalomError: it is a cluster that these engines are not, or asks for what they cannot do
    """
    scenario.check_live(of_others=True)
    if scenario.engine == "own":  # it may be about engines of others without saying so; then nobody decodes elsewhere
        stays = scenario.decisions.model_copy(update={"place_decode": False})
        for wrong in misfits("vllm", scenario.cluster, stays):
            raise SlalomError(*wrong)
    specs = arena.arranged(bound.arrangement)
    if len(specs) != len(engines):
        raise SlalomError("--engines", f"{len(engines)} engines", f"{scenario.name} has {len(specs)} instances")
    for k, (spec, engine) in enumerate(zip(specs, engines, strict=True)):
        if scenario.engine == "own" and spec.role != Role.MIXED:
            raise SlalomError(f"instances[{k}].role", spec.role.name.lower(), "engines of others are mixed")
        if engine.max_batch is not None and spec.max_batch > engine.max_batch:
            fix = f"{engine.url} runs {engine.max_batch} sequences at once: set max_batch so"
            raise SlalomError(f"instances[{k}].max_batch", spec.max_batch, fix)
    return [replace(spec, remote=True, watermark=0.0, pool=i) for i, spec in enumerate(specs)]


def _state(arena: Arena, specs: Sequence[InstanceSpec], trace: Trace) -> ClusterState:
    return build_state(
        specs, arena.profile, arena.share, classes=arena.classes, links=arena.links,
        options=replace(arena.options, place_decode=arena.options.place_decode and arena.scenario.engine == "vllm"),
        max_requests=trace.n, prefix_cache=trace.hash_tokens > 0,
    )  # fmt: skip


@contextmanager
def _open(fleet: Fleet) -> Iterator[None]:
    """The event loop of ``fleet``, in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="engines", daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(fleet.open(), loop).result()
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(fleet.close(), loop).result(10.0)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def replay(
    scenario: Scenario,
    policy: Any,
    *,
    rate: float,
    engines: Sequence[EngineFacts],
    n_requests: int | None = None,
    seed: int = 0,
    split: Literal["train", "valid", "test"] = "test",
    drain_s: float = DRAIN_S,
) -> EngineRun:
    """Route the requests that :func:`env.surrogate.simulate.simulate` would serve; parameters as there.

    :param engines: one for each instance; nobody else should use them
    :param drain_s: requests still open this long after the last arrival are cut off and count as unfinished
    :raises SlalomError: bad rate, or a policy, workload or cluster that does not fit the engines
    """
    if not rate > 0:
        raise SlalomError("rate", rate, "give a positive number of requests per second")
    arena = arena_of(scenario)
    bound: Policy = bind_policy(policy, scenario, None)
    trace = build_trace(scenario, rate, n_requests or scenario.n_requests, seed, split)
    check_classes(trace, len(scenario.classes))
    specs = _specs(scenario, arena, bound, engines)
    longest, room = int((trace.prompt + trace.output).max()), min(e.context or 2**31 for e in engines)
    if longest >= room:
        fix = f"the engines hold {room} tokens of a request; set max_context"
        raise SlalomError("workload", f"a request of {longest} tokens", fix)
    if (scenario.hash(), bound.name) not in _REHEARSED:
        rehearse(_state(arena, specs, trace), bound, None)
        _REHEARSED.add((scenario.hash(), bound.name))
    state = _state(arena, specs, trace)
    fleet = Fleet([(engine.url, engine.keeps) for engine in engines])
    router = Router(state, bound, fleet)
    # What a run before this one has left in the engines' prefix caches must not help it.
    client = Client(trace, _VOCABULARY, salt=secrets.randbits(63))
    model, counts = engines[0].model, all(engine.counts for engine in engines)
    common = {"model": model, "temperature": 0, "ignore_eos": True, "stream": True}
    common |= {"stream_options": {"include_usage": True} | ({"continuous_usage_stats": True} if counts else {})}

    def send(row: int, prompt: list[int]) -> Ticket:
        body = common | {"prompt": prompt, "max_tokens": int(trace.output[row])}
        return router.submit(
            "/v1/completions", body, n_letters=0, tokens=np.asarray(prompt, np.int64), known=True, headers={},
            whole=False, strip_usage=False, cls=int(trace.cls[row]), **targets_of(trace, row),
        )  # fmt: skip

    device = f"{len(engines)} engines of {model}"
    with _open(fleet):
        return play(router, client, send, drain_s, device=device, **said_of(scenario, rate, seed))
