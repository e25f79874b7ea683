"""``route``: an OpenAI-compatible router whose requests a policy dispatches to engines that others wrote."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.common.options import command_app, listed, option, run_command, same, takes
from engine.core.kinds import Batching, Order, Role
from engine.core.policy import InstancePlan, Policy, from_outside
from engine.core.setup import ClusterOptions, InstanceSpec, LinkSpec
from engine.core.state import ClusterState
from engine.errors import SlalomError
from policies import serve

if TYPE_CHECKING:
    from fastapi import FastAPI

    from engine.live.guard import Guard
    from engine.remote.discover import EngineFacts
    from engine.remote.router import Router

_log = logging.getLogger("slalom.route")
_KV_TOKENS, _MAX_BATCH = 2**17, 256  # where neither the user nor the engine says
_CHUNK_TOKENS = 2048
_MEASURE_S, _MEASURE_TOKENS, _MEASURE_BATCH = 10.0, 512, 8  # at the start
app = command_app()


@dataclass(frozen=True)
class Options:
    """Who is routed to, and how. What :class:`policies.serve.Options` has too means the same."""

    engines: str = option(..., "addresses of the engines, which speak OpenAI's API: URL,URL,...")
    policy: str = same(serve.Options, "policy")
    profile: str = option("", "latency profile of one engine, by name or path; default: timed at the start")
    order: str = option(
        "", "which prompts engines get first: fcfs, shortest or on_time; default: the policy's, else fcfs"
    )
    kv_tokens: int = option(0, "KV capacity of an engine, tokens; 0: what it says, else 131072", min=0, max=2**31 - 1)
    max_batch: int = option(0, "sequences that an engine runs at once; 0: what it says, else 256", min=0, max=65536)
    chunk_tokens: int = option(_CHUNK_TOKENS, "prompt tokens that an engine computes in a step", min=16, max=2**30)
    prefix_cache: bool = option(True, "engines reuse the KV of prompts that begin alike")
    kv_transfer: bool = option(
        False,
        "engines pull KV from each other (vLLM: NixlConnector), so one may prefill and another decode",
        "--kv-transfer",
    )
    roles: str = option(
        "", "with --kv-transfer: prefill, decode or mixed, one for all or one for each; default: the policy's"
    )
    reallocate: bool = option(False, "with --kv-transfer: the policy may change roles", "--reallocate")
    at_once: int = same(serve.Options, "at_once")
    engine_deadlines: bool = option(
        False, "send deadlines as priority (vLLM: --scheduling-policy priority)", "--engine-deadlines"
    )
    max_requests: int = same(serve.Options, "max_requests")
    ttft_ms: float = same(serve.Options, "ttft_ms")
    tpot_ms: float = same(serve.Options, "tpot_ms")
    classes: str = same(serve.Options, "classes")
    shed: bool = same(serve.Options, "shed")
    host: str = same(serve.Options, "host")
    port: int = same(serve.Options, "port")
    max_connections: int = same(serve.Options, "max_connections")
    header_timeout_s: float = same(serve.Options, "header_timeout_s")
    body_timeout_s: float = same(serve.Options, "body_timeout_s")
    idle_timeout_s: float = same(serve.Options, "idle_timeout_s")
    api_key: str = same(serve.Options, "api_key")
    api_key_file: str = same(serve.Options, "api_key_file")
    drain_s: float = same(serve.Options, "drain_s")
    fallback: str = same(serve.Options, "fallback")
    deadline_us: float = same(serve.Options, "deadline_us")
    advisory: bool = same(serve.Options, "advisory")
    guard_config: str = same(serve.Options, "guard_config")
    decision_log: str = same(serve.Options, "decision_log")
    health_s: float = option(1.0, "seconds between two looks at an engine that says nothing", min=0.05, max=3600)
    health_timeout_s: float = option(3.0, "seconds that an engine may take to answer one", min=0.05, max=3600)
    stall_s: float = option(30.0, "seconds that a stream of an ejected engine may be silent", min=0.1, max=86_400)
    outage_s: float = option(10.0, "seconds that requests wait while no engine answers", min=0.1, max=86_400)


def _order(options: Options, policy_order: int | None) -> int:
    if not options.order:
        return int(Order.FCFS if policy_order is None else policy_order)
    known = {"fcfs": Order.FCFS, "shortest": Order.SHORTEST, "on_time": Order.ON_TIME}
    if options.order not in known:
        raise SlalomError("--order", options.order, f"use {', '.join(known)}")
    return int(known[options.order])


def _check(options: Options) -> None:
    """:raises SlalomError: an option that cannot be had, whatever the engines are"""
    _order(options, None)
    for name, value in (("--roles", options.roles), ("--reallocate", options.reallocate)):
        if value and not options.kv_transfer:
            raise SlalomError(name, value, "engines that pull no KV are mixed; add --kv-transfer if they do")


def _roles(options: Options, n: int) -> list[Role]:
    """What each engine is used for at the start. A role is the router's own affair: the engines are all alike."""
    roles = serve.parse_roles(options.roles, n)
    if Role.MULTIPLEXED in roles:
        raise SlalomError("--roles", options.roles, "engines of others are not divided: use prefill, decode or mixed")
    return roles


def _specs(options: Options, engines: Sequence[EngineFacts]) -> list[InstanceSpec]:
    """One instance for each engine: it batches in chunks, as engines do, and keeps nothing back."""
    roles = _roles(options, len(engines))
    return [
        InstanceSpec(
            role=roles[i],
            pool=i,
            gpu=i,
            kv_tokens=options.kv_tokens or engine.kv_tokens or _KV_TOKENS,
            batching=Batching.CHUNKED,
            chunk_tokens=options.chunk_tokens,
            max_batch=options.max_batch or engine.max_batch or _MAX_BATCH,
            watermark=0.0,
            remote=True,
        )
        for i, engine in enumerate(engines)
    ]


def _arranged(options: Options, spec: InstanceSpec, plan: InstancePlan) -> InstanceSpec:
    """``spec`` as a policy wants to begin, where the user does not say otherwise."""
    plan = from_outside(plan)
    role = plan.role if options.kv_transfer and not options.roles else None
    return replace(spec, order=_order(options, plan.order), role=spec.role if role is None else Role(role))


def find_engines(urls: str) -> list[EngineFacts]:
    """What the engines say. One that does not answer now is taken to be like the first that does.

    :raises SlalomError: none answers, or one is named twice
    """
    from engine.remote.discover import discover

    names = [url.rstrip("/") for url in listed(urls)]
    if not names or len(set(names)) != len(names):
        raise SlalomError("--engines", urls, "name each engine once: URL,URL,...")
    found: dict[str, EngineFacts] = {}
    last: SlalomError | None = None
    for name in names:
        try:
            found[name] = discover(name)
        except SlalomError as error:
            last = error
            _log.warning("%s", error)
    if last is not None and not found:
        raise last
    first = next(iter(found.values()))
    return [found.get(name) or replace(first, url=name) for name in names]


def build(options: Options) -> tuple[Router, FastAPI]:
    """Ask the engines, find the policy and start the router.

    :return: the running router and its application
    :raises SlalomError: an option that cannot be had, or no engine answers
    """
    _check(options)
    engines = find_engines(options.engines)
    from engine.remote.fleet import Fleet, Patience
    from engine.remote.router import Router
    from engine.server.keys import find_key
    from engine.server.routed import create_router_app

    desk = open_desk(options, engines)
    patience = Patience(options.health_s, options.health_timeout_s, options.stall_s, options.outage_s)
    fleet = Fleet([(engine.url, engine.keeps) for engine in engines], patience)
    router = Router(desk.state, desk.policy, fleet, guard=desk.guard).start()
    application = create_router_app(
        router,
        engines[0].model,
        counts=all(engine.counts for engine in engines),
        deadlines=options.engine_deadlines,
        classes=desk.classes,
        load_policy=lambda spec: serve.find_policy(spec, desk.state),
        drain_s=options.drain_s,
        api_key=find_key(options.api_key, options.api_key_file),
    )
    return router, application


class Desk(NamedTuple):
    """What decides for a fleet: an idle cluster with an instance for each engine, a policy and its guard, and the names
    of the SLO classes."""

    state: ClusterState
    policy: Policy
    guard: Guard
    classes: list[str]


def open_desk(options: Options, engines: Sequence[EngineFacts]) -> Desk:
    """Find the policy, arrange the engines as it wants, and rehearse.

    :raises SlalomError: an option that cannot be had
    """
    from engine.live.engine import build_state
    from engine.remote.rehearse import REHEARSED, rehearse

    roles = (Role.PREFILL, Role.DECODE, Role.MIXED) if options.kv_transfer else (Role.MIXED,)
    classes = serve.load_classes(options.classes, options.ttft_ms * 1e-3, options.tpot_ms * 1e-3)
    profile, share = _profile(options, engines)
    levers = {name: getattr(options, name) for name in ("shed", "reallocate", "at_once")}

    def state_of(specs: Sequence[InstanceSpec], least: int = 1) -> ClusterState:
        return build_state(
            specs,
            profile,
            share,
            classes=list(classes.values()),
            options=ClusterOptions(roles=roles, hold=True, place_decode=options.kv_transfer, **levers),
            links=[LinkSpec() for _ in specs] if options.kv_transfer else (LinkSpec(),),
            max_requests=max(options.max_requests, least),
            prefix_cache=options.prefix_cache,
        )

    specs = _specs(options, engines)
    state = state_of(specs)
    policy = serve.find_policy(options.policy, state)
    plans = policy.arrangement or [InstancePlan()] * len(specs)
    specs = [_arranged(options, spec, plan) for spec, plan in zip(specs, plans, strict=True)]
    _log.info("warming up: code is compiled where it is new")
    small = state_of(specs, REHEARSED)
    scratch = serve.find_policy(options.policy, small)
    rehearse(small, scratch, serve.find_guard(options, small, scratch, log=False))
    state = state_of(specs)
    guard = serve.find_guard(options, state, policy, classes=list(classes))
    return Desk(state, policy, guard, list(classes))


def _profile(options: Options, engines: Sequence[EngineFacts]) -> tuple[Any, Any]:
    """What predictions are made with; where none is named, timed on the first engine, which should be idle."""
    from engine.latency import Profile, pack

    if options.profile:
        return pack([Profile.load(options.profile)], of_others=True)
    from engine.calibration.from_outside import profile_of
    from engine.calibration.outside import Limits, measure

    _log.info("timing %s (--profile names a profile instead)", engines[0].url)
    limits = Limits(_MEASURE_S, 0.1, _MEASURE_TOKENS, _MEASURE_BATCH).within(engines[0])
    measured, _ = measure(engines[0], limits)
    found = profile_of(measured, engines[0], "at-start")
    assert found.fit is not None
    errors = 100 * found.fit.prefill_mape, 100 * found.fit.decode_mape
    _log.info("held out, it misses prefill by %.0f %%, decode by %.0f %%; calibrate --engine does better", *errors)
    return pack([found], of_others=True)


@app.command()
@takes(Options)
def route(options: Options) -> None:
    """Stand in front of engines that speak OpenAI's API: a policy decides which one gets a request, and when.

    /dashboard shows it live, /metrics counts it, and clients on this machine may change policy and mode under /admin.

    \b
    Example:
      route --engines http://gpu1:8000,http://gpu2:8000 --policy predicted_ttft --order on_time
    """
    from engine.server.running import open_and_serve

    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request
    open_and_serve(options, lambda: build(options), lambda router: f"routing to {len(router.state.inst)} engines")


def main() -> None:
    """Entry point."""
    run_command("route", app)
