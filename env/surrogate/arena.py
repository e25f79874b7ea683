"""From a scenario to the arrays of the core: profiles, instances, links, SLO classes, requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np

from engine.core.kinds import Batching, Order, Role, Split
from engine.core.policy import InstancePlan, from_outside
from engine.core.setup import (
    ClusterOptions,
    InstanceSpec,
    LinkSpec,
    SloClass,
    arranged,
    blank_requests,
    new_cluster,
)
from engine.core.state import ClusterState
from engine.core.ticks import arrival_ticks, duration_ticks
from engine.errors import SlalomError
from engine.latency import pack
from env.others import batching_of
from env.scenario import Scenario
from env.surrogate.seen import Seen
from env.workload import Trace, assign_classes
from env.workload.trace import classes_by_name
from policies.setting import Setting

#: Simulated seconds that requests still running at the last arrival are given to end.
DRAIN_S = 300.0
SESSION_DRAIN_S = 3600.0

_SPLITS = {"auto": Split.AUTO, "on_demand": Split.ON_DEMAND}
_ORDERS = {
    "fcfs": Order.FCFS, "srf": Order.SHORTEST, "srf_preemptive": Order.SHORTEST_PREEMPTIVE, "on_time": Order.ON_TIME
}  # fmt: skip

_WORDS = numba.types.Array(numba.int64, 1, "C")


@dataclass(frozen=True, eq=False)
class Arena:
    """A scenario made ready: everything but the requests and the policy.

    :param specs: the instances as the scenario starts them
    :param profile: PROFILE (n,) and ``share`` SHARE (n, M) of the profiles in use
    :param error: relative spread of step times to train with
    :param n_gpus: what goodput per GPU divides by
    """

    scenario: Scenario
    specs: tuple[InstanceSpec, ...]
    links: tuple[LinkSpec, ...]
    classes: tuple[SloClass, ...]
    options: ClusterOptions
    profile: np.ndarray
    share: np.ndarray
    error: float
    setting: Setting
    n_gpus: int

    def arranged(self, plan: Sequence[InstancePlan] | None) -> tuple[InstanceSpec, ...]:
        """The instances after a policy's static arrangement was applied.

        :raises SlalomError: it uses a role that the scenario does not allow
        """
        if plan is None:
            return self.specs
        self.setting.check_roles(plan, self.scenario.name)
        if self.scenario.engine != "own":
            plan = [from_outside(p) for p in plan]
        return tuple(arranged(spec, p) for spec, p in zip(self.specs, plan, strict=True))

    def cluster(self, plan: Sequence[InstancePlan] | None, trace: Trace | None, horizon_s: float = 0.0) -> ClusterState:
        """An idle cluster that holds the requests of ``trace``."""
        options = replace(self.options, horizon_s=horizon_s, hash_tokens=trace.hash_tokens if trace else 0)
        state = new_cluster(
            self.arranged(plan),
            self.profile,
            self.share,
            classes=self.classes,
            options=options,
            links=self.links,
            hashes=trace.hashes if trace is not None and len(trace.hashes) else None,
        )
        if trace is None:
            return state
        trace = classes_by_name(trace, [c.name for c in self.scenario.classes])
        check_classes(trace, len(self.classes))
        state.cluster["n_requests"] = trace.n
        return state._replace(req=requests_of(trace))


def _specs(scenario: Scenario, n_links: int) -> tuple[InstanceSpec, ...]:
    profiles = scenario.load_profiles()
    specs = []
    for i, place in enumerate(scenario.placements()):
        group, profile = place.group, profiles[place.profile]
        specs.append(
            InstanceSpec(
                role=Role[group.role.upper()],
                pool=place.pool,
                kv_tokens=group.kv_tokens or profile.kv_tokens,
                profile=place.profile,
                gpu=place.gpu,
                link=i if n_links > 1 else 0,
                batching=Batching[group.batching_used.upper()],
                chunk_tokens=group.chunk_tokens,
                prefill_tokens=group.prefill_tokens,
                max_batch=group.max_batch,
                max_prefills=group.max_prefills,
                split=_SPLITS[group.split] if isinstance(group.split, str) else profile.row(group.split),
                order=_ORDERS[group.order],
                headroom=group.headroom,
                **batching_of(scenario.engine),
            )
        )
    return tuple(specs)


def _roles(names: Sequence[str]) -> tuple[Role, ...]:
    return tuple(Role[name.upper()] for name in names) or tuple(Role)


def _options(scenario: Scenario) -> ClusterOptions:
    d = scenario.decisions
    return ClusterOptions(
        hold=d.hold,
        shed=d.shed,
        place_decode=d.place_decode,
        reallocate=d.reallocate,
        tune=d.tune,
        roles=_roles(d.roles),
        min_prefill=scenario.min_prefill,
        min_decode=scenario.min_decode,
        at_once=d.at_once,
        hand_over=d.drain == "hand_over",
        hold_s=scenario.hold_interval_s,
        hold_scan=scenario.hold_scan,
        hold_limit_s=scenario.hold_limit_s,
        tail_factor=scenario.tail_factor,
        control_s=scenario.control_interval_s,
    )


def _jitter(scenario: Scenario) -> float:
    """Relative spread of step times: the scenario's, or the largest error its profiles admit.

    That is the held-out error of the fit and, where surrogate and engine were compared, how far step times were off.
    """
    if scenario.latency_jitter != "profile":
        return float(scenario.latency_jitter)
    errors = [p.fit for p in scenario.load_profiles() if p.fit is not None]
    found = [x for e in errors for x in (e.prefill_mape, e.decode_mape) if x is not None]
    measured = [(p.fidelity or {}).get("step_spread") for p in scenario.load_profiles()]
    found += [float(x) for x in measured if isinstance(x, int | float)]
    return max(found, default=0.03)


def _mean_lengths(scenario: Scenario) -> tuple[float, float]:
    """Mean prompt and output tokens of the training window, for rules that plan ahead."""
    trace = _drawn(scenario, scenario.reference_rate, min(500, scenario.n_requests), 0, "train")
    return float(trace.prompt.mean()), float(trace.output.mean())


_ARENAS: dict[str, Arena] = {}


def arena_of(scenario: Scenario) -> Arena:
    """The arena of a scenario, made once per content."""
    key = scenario.hash()
    if key not in _ARENAS:
        n = len(scenario.placements())
        bandwidth = scenario.links.bandwidth_gb_s * 1e9
        latency = -1.0 if scenario.links.latency_ms is None else scenario.links.latency_ms * 1e-3
        n_links = n if scenario.links.contention == "ingress" else 1
        links = tuple(LinkSpec(bandwidth, latency) for _ in range(n_links))
        classes = tuple(SloClass(c.ttft_s, c.tpot_s, c.ttft_factor, c.weight) for c in scenario.classes)
        specs = _specs(scenario, n_links)
        profile, share = pack(scenario.load_profiles(), of_others=scenario.engine != "own")
        empty = new_cluster(specs, profile, share, classes=classes, options=_options(scenario), links=links)
        usable = frozenset(_roles(tuple(scenario.usable_roles())))
        _ARENAS[key] = Arena(
            scenario=scenario,
            specs=specs,
            links=links,
            classes=classes,
            options=_options(scenario),
            profile=profile,
            share=share,
            error=_jitter(scenario),
            setting=replace(Setting.of_state(empty, *_mean_lengths(scenario)), usable_roles=usable),
            n_gpus=scenario.n_gpus(),
        )
    return _ARENAS[key]


def build_trace(scenario: Scenario, rate: float, n: int, seed: int, split: Any) -> Trace:
    """Requests of the scenario's workload; classes drawn by its shares unless the workload binds them.

    :raises SlalomError: the workload names a class that is none of the scenario's; see also ``WorkloadBase.build``
    """
    trace = _drawn(scenario, rate, n, seed, split)
    check_classes(trace, len(scenario.classes))
    shares = [c.share for c in scenario.classes]
    return trace if trace.bound or len(shares) == 1 else assign_classes(trace, shares, seed)


def _drawn(scenario: Scenario, rate: float, n: int, seed: int, split: Any) -> Trace:
    trace = scenario.workload.build(rate, n, seed, split, [c.name for c in scenario.classes])
    if not trace.n:
        raise SlalomError("workload", f"{n} requests", "none of them fits: raise max_context, or draw shorter ones")
    return trace


def check_classes(trace: Trace, n: int) -> None:
    """Class numbers become indices of the core's arrays.

    :param n: classes of the cluster that will serve ``trace``
    :raises SlalomError: a request of a class that is none
    """
    last = int(trace.cls.max(initial=0))
    if last >= n:
        raise SlalomError(f"trace {trace.name}: class", last, f"the scenario has {n} classes, numbered from 0")


def requests_of(trace: Trace) -> np.ndarray:
    """The requests of a trace as core records, REQUEST (n,), in state NEW."""
    req = blank_requests(trace.n)
    roots = slice(0, trace.n_roots)
    req["arrival"][roots] = arrival_ticks(f"trace {trace.name}", trace.arrival_s[roots])
    req["prompt"], req["output"], req["cls"] = trace.prompt, trace.output, trace.cls
    for column, seconds in (("ttft_slo", trace.ttft_s), ("tpot_slo", trace.tpot_s)):
        own = np.isfinite(seconds)
        if own.any():
            req[column][own] = duration_ticks(seconds[own], 1)
    req["next_turn"] = trace.next_turn
    req["think"] = duration_ticks(np.nan_to_num(trace.think_s))
    req["hash_off"], req["hash_n"] = trace.hash_start, trace.hash_n
    return req


def horizon_s(trace: Trace) -> float:
    """When a run is cut: late enough that only requests that are hopeless are still open."""
    last = float(trace.arrival_s[trace.n_roots - 1])
    return last + (SESSION_DRAIN_S if trace.n > trace.n_roots else DRAIN_S)


def seen_in(scenario: Scenario, split: Any, seed: Any) -> Seen:
    """What those who decide know in one episode: as the scenario says, in training drawn from what it randomises.

    :param seed: of the episode, whatever ``numpy.random.default_rng`` takes
    """
    found = Seen(scenario.observation_delay_s, scenario.routers)
    choices = scenario.randomise
    if split != "train":
        return found
    rng = np.random.default_rng(seed)
    if choices.observation_delay_s:
        found = replace(found, delay_s=float(rng.choice(choices.observation_delay_s)))
    if choices.routers:
        found = replace(found, routers=int(rng.choice(choices.routers)))
    return found


def jittered(state: ClusterState, spread: float, rng: np.random.Generator) -> Mapping[str, np.ndarray]:
    """What steps really take in one episode: the nominal profile, off by a few percent per instance and phase.

    :return: ``true_profile`` (N,) and ``true_share`` (N, M) for ``new_sim``
    """
    rows = state.inst["profile"]
    profile, share = state.profile[rows].copy(), state.share[rows].copy()
    prefill, decode = np.exp(rng.normal(0.0, spread, (2, len(rows))))
    for name in ("prefill", "knot_s"):
        share[name] *= prefill[:, None, None]
    for name in ("decode_small", "decode_large"):
        share[name] *= decode[:, None, None]
    return {"true_profile": profile, "true_share": share}


def slowed(state: ClusterState, factor: float) -> Mapping[str, np.ndarray]:
    """As :func:`jittered`: every step takes ``factor`` times what the nominal profile says."""
    rows = state.inst["profile"]
    profile, share = state.profile[rows].copy(), state.share[rows].copy()
    for name in ("prefill", "knot_s", "decode_small", "decode_large"):
        share[name] *= factor
    for name in ("fused_shared_s", "floor_s_per_token"):
        share[name] *= factor
    for name in ("step_overhead_s", "ctx_overhead_s"):
        profile[name] *= factor
    return {"true_profile": profile, "true_share": share}
