"""DistServe's placement algorithms for prefill/decode disaggregation, on the surrogate.

Both test the 90th percentiles separately, as the paper and its simulator do: the share of requests within
their TTFT target, and the share within their TPOT target, must each reach the goal. Pipeline parallelism is
left out (the shipped profiles are measured without); a configuration is therefore a pair of profiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from engine.core.kinds import Role
from engine.core.setup import ClusterOptions, InstanceSpec, LinkSpec, SloClass, new_cluster
from engine.errors import SlalomError
from engine.latency import Profile, pack
from engine.latency.profile import list_profiles
from env.measure.goodput import largest_rate
from env.measure.metrics import outcomes
from env.scenario import Scenario
from env.surrogate.arena import build_trace, horizon_s, requests_of
from env.surrogate.clock import new_sim
from env.surrogate.simulate import driver, simulate
from env.workload import Split, Trace
from eval.placement.fleet import is_tradable
from policies.load import load_policy
from policies.setting import Setting

#: Bandwidth inside a node where Algorithm 2 places both phases: NVLink of A100 (600 GB/s, one direction).
NODE_GB_S = 300.0
_AMPLE_TOKENS = 4_000_000
_BATCHES = 16


@dataclass(frozen=True)
class Disaggregated:
    """A placement of prefill and decode instances.

    :param prefill: profile of the prefill instances; ``decode`` of the decode instances
    :param n: prefill instances; ``m`` decode instances
    :param prefill_rate: requests per second that one prefill instance sustains (Algorithm 2: the pair)
    :param decode_rate: the same for one decode instance
    :param gpus: used by all of them
    """

    algorithm: Literal[1, 2]
    prefill: str
    decode: str
    n: int
    m: int
    prefill_rate: float
    decode_rate: float
    gpus: int

    @property
    def per_gpu(self) -> float:
        """Requests per second and GPU when neither phase idles."""
        rate = min(self.n * self.prefill_rate, self.m * self.decode_rate)
        return rate / self.gpus


def steady_requests(scenario: Scenario) -> int:
    """Requests enough to fill the largest decode batch of the scenario many times over.

    A decode instance with long answers looks far too fast on fewer: most of them arrive before its batch is full.
    """
    return max(1000, _BATCHES * max(group.max_batch for group in scenario.cluster))


def siblings(scenario: Scenario) -> list[Profile]:
    """Shipped profiles of the scenario's model, device and engine at any tensor parallelism, by ``tp``.

    Only the scenario's own where a class has a ``ttft_factor``: that target would move with the profile.
    """
    own = {p.name: p for p in scenario.load_profiles()}
    if all(c.ttft_factor == 0.0 for c in scenario.classes):
        kinds = {(p.model, p.device, p.engine) for p in own.values()}
        shipped = [Profile.load(name) for name in list_profiles() if name not in own]
        own |= {p.name: p for p in shipped if (p.model, p.device, p.engine) in kinds}
    return sorted(own.values(), key=lambda p: (p.tp, p.name))


def reference(scenario: Scenario, profile: Profile) -> str:
    """How a group of instances names ``profile``: as the scenario does, which may be by path."""
    own = zip(scenario.profile_names(), scenario.load_profiles(), strict=True)
    return next((name for name, known in own if known.name == profile.name), profile.name)


def transfer_s(scenario: Scenario, profile: Profile) -> float:
    """Seconds to move the KV of a mean prompt over the scenario's links (0: free)."""
    if scenario.links.bandwidth_gb_s == 0.0:
        return 0.0
    prompt = build_trace(scenario, scenario.reference_rate, 500, 0, "valid").prompt.mean()
    return float(prompt) * profile.kv_bytes_per_token / (scenario.links.bandwidth_gb_s * 1e9)


def choose_algorithm(scenario: Scenario) -> Literal[1, 2]:
    """1 where KV moves fast, 2 where it must stay inside a node.

    The paper says high or low node affinity without a threshold; here low means that a mean prompt's KV
    takes longer than the tightest TPOT target (inferred: the gap before token two then misses it).
    """
    slowest = max(transfer_s(scenario, profile) for profile in scenario.load_profiles())
    return 2 if slowest > min(c.tpot_s for c in scenario.classes) else 1


def _alone(profile: Profile, phase: Literal["prefill", "decode"]) -> tuple[np.ndarray, np.ndarray]:
    """PROFILE (2,) and SHARE (2, M): ``profile``, and beside it one whose steps take next to no time."""
    table, share = pack([profile, profile])
    free = 1 if phase == "prefill" else 0
    for name in ("prefill", "decode_small", "decode_large"):
        share[name][free] = 0.0
        share[name][free, :, -1] = 1e-9
    for name in ("n_knots", "floor_s_per_token"):
        share[name][free] = 0
    for name in ("step_overhead_s", "ctx_overhead_s"):
        table[name][free] = 0.0
    return table, share


def phase_goodput(
    scenario: Scenario,
    profile: Profile,
    phase: Literal["prefill", "decode"],
    *,
    goal: float = 0.9,
    n_requests: int = 1000,
    prefill_tokens: int = 8192,
    max_batch: int = 1024,
    tolerance: float = 0.02,
    requests_at: Callable[[float], Trace] | None = None,
) -> float:
    """Requests per second that one instance of ``profile`` sustains when the other phase costs nothing.

    :param phase: ``prefill`` tests TTFT, ``decode`` tests TPOT
    :param goal: share of requests within the target
    :param requests_at: the requests at a rate, instead of ``n_requests`` of the scenario's workload
    """
    table, share = _alone(profile, phase)
    specs = tuple(
        InstanceSpec(
            role=role,
            pool=i,
            gpu=i,
            link=i,
            profile=i,
            kv_tokens=profile.kv_tokens if role.name.lower() == phase else _AMPLE_TOKENS,
            prefill_tokens=prefill_tokens,
            max_batch=max_batch if role.name.lower() == phase else 4096,
        )
        for i, role in enumerate((Role.PREFILL, Role.DECODE))
    )
    classes = tuple(SloClass(c.ttft_s, c.tpot_s, c.ttft_factor, c.weight) for c in scenario.classes)
    links = (LinkSpec(bytes_per_s=0.0, latency_s=0.0),) * 2

    def attainment(rate: float) -> float:
        trace = requests_at(rate) if requests_at else build_trace(scenario, rate, n_requests, 0, "valid")
        options = ClusterOptions(horizon_s=horizon_s(trace))
        state = new_cluster(specs, table, share, classes=classes, links=links, options=options)
        state.cluster["n_requests"] = trace.n
        state = state._replace(req=requests_of(trace))
        policy = load_policy("distserve", Setting.of_state(state))
        sim = new_sim(state, n_roots=trace.n_roots)
        driver(state, sim, policy)()
        found = outcomes(SimpleNamespace(req=state.req))
        return float((found.ttft_ok if phase == "prefill" else found.tpot_ok).mean())

    return largest_rate(attainment, scenario.reference_rate, goal, tolerance=tolerance)


def shares_met(
    scenario: Scenario, policy: tuple[str, Mapping[str, Any]], rate: float, n_requests: int, seeds: Sequence[int],
    split: Split = "valid",
) -> tuple[float, float, float]:  # fmt: skip
    """Shares of requests with both targets met, TTFT met and TPOT met, over all seeds.

    :param policy: a rule and its values
    """
    name, values = policy
    rows = []
    for seed in seeds:
        run = simulate(scenario, name, rate=rate, n_requests=n_requests, seed=seed, split=split, values=values)
        found = outcomes(run)
        rows.append((found.good.mean(), found.ttft_ok.mean(), found.tpot_ok.mean()))
    both, ttft, tpot = np.mean(rows, axis=0)
    return float(both), float(ttft), float(tpot)


def _fitting(scenario: Scenario, node_gpus: int) -> list[Profile]:
    if not is_tradable(scenario):
        fix = "DistServe's algorithms buy as many instances as they like of one kind; plan such a fleet as it stands"
        raise SlalomError(f"{scenario.name}: cluster", ", ".join(scenario.profile_names()), fix)
    profiles = [p for p in siblings(scenario) if p.tp <= node_gpus]
    if not profiles:
        raise SlalomError("node_gpus", node_gpus, "no profile of this model runs on so few GPUs")
    return profiles


def algorithm_1(
    scenario: Scenario, rate: float, *, node_gpus: int = 8, goal: float = 0.9, **effort: Any
) -> Disaggregated:
    """Placement where bandwidth between nodes is high (DistServe, Algorithm 1).

    Each phase is searched alone: the parallelism with the most goodput per GPU, then as many instances as
    the traffic needs, n = ceil(R / g_P), m = ceil(R / g_D).

    :param rate: traffic R, requests per second
    :param node_gpus: GPUs of a node, which bound one instance
    :param effort: see :func:`phase_goodput`
    :raises SlalomError: no profile fits a node, or no instance reaches the goal at any rate
    """
    best: dict[str, tuple[float, Profile]] = {}
    for profile in _fitting(scenario, node_gpus):
        for phase in ("prefill", "decode"):
            found = phase_goodput(scenario, profile, phase, goal=goal, **effort)
            if found > 0.0 and (phase not in best or found / profile.tp > best[phase][0] / best[phase][1].tp):
                best[phase] = (found, profile)
    for phase in ("prefill", "decode"):
        if phase not in best:
            raise SlalomError("classes", phase, f"no instance meets this {phase} target; loosen it")
    (g_p, p), (g_d, d) = best["prefill"], best["decode"]
    n, m = math.ceil(rate / g_p), math.ceil(rate / g_d)
    return Disaggregated(1, p.name, d.name, n, m, g_p, g_d, n * p.tp + m * d.tp)


def algorithm_2(
    scenario: Scenario,
    rate: float,
    *,
    node_gpus: int = 8,
    goal: float = 0.9,
    n_requests: int = 1000,
    prefill_tokens: int = 8192,
    max_batch: int = 1024,
    tolerance: float = 0.02,
    node_gb_s: float = NODE_GB_S,
    seeds: Sequence[int] = (0,),
) -> Disaggregated:
    """Placement where bandwidth between nodes is low (DistServe, Algorithm 2).

    Prefill and decode of a request share a node, so that KV moves over ``node_gb_s``. Every pair with
    tp_P + tp_D ≤ ``node_gpus`` is simulated jointly; the one with the most goodput per GPU is replicated
    ceil(R / goodput) times.

    :raises SlalomError: no pair fits a node, or none reaches the goal at any rate
    """
    best: tuple[float, float, Profile, Profile] | None = None
    profiles = _fitting(scenario, node_gpus)
    for p in profiles:
        for d in profiles:
            if p.tp + d.tp > node_gpus:
                continue
            groups = [
                {"count": 1, "role": "prefill", "profile": reference(scenario, p), "prefill_tokens": prefill_tokens},
                {"count": 1, "role": "decode", "profile": reference(scenario, d), "max_batch": max_batch},
            ]
            pair = scenario.fixed_on(*groups, **{"links.bandwidth_gb_s": node_gb_s})
            found = _pair_goodput(pair, prefill_tokens, goal, n_requests, tolerance, seeds)
            if found > 0.0 and (best is None or found / (p.tp + d.tp) > best[0]):
                best = (found / (p.tp + d.tp), found, p, d)
    if best is None:
        raise SlalomError("classes", "targets", f"no pair on {node_gpus} GPUs meets them; loosen them or add GPUs")
    _, found, p, d = best
    copies = math.ceil(rate / found)
    return Disaggregated(2, p.name, d.name, copies, copies, found, found, copies * (p.tp + d.tp))


def _pair_goodput(
    pair: Scenario, prefill_tokens: int, goal: float, n_requests: int, tolerance: float, seeds: Sequence[int]
) -> float:
    policy = "distserve", {"prefill_tokens": prefill_tokens}

    def attainment(rate: float) -> float:
        return min(shares_met(pair, policy, rate, n_requests, seeds)[1:])

    return largest_rate(attainment, pair.reference_rate, goal, tolerance=tolerance)
