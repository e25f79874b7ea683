"""Random small clusters with random requests, for property tests of the core and the surrogate.

A :class:`Case` is plain data, so that hypothesis can shrink it and a failure prints all of it; ``Case.build`` turns
it into the arrays of the core. Pools hold a few dozen blocks, so preemption, eviction and back-pressure are common.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from engine.core.kinds import Batching, Order, Role, Split
from engine.core.setup import ClusterOptions, InstanceSpec, LinkSpec, SloClass, blank_requests, new_cluster
from engine.core.state import ClusterState
from engine.latency.evaluate import PROFILE, SHARE, TICKS_PER_S
from env.surrogate.clock import Sim, new_sim

#: Simulated seconds after which a run counts as stuck; every case ends well before.
STUCK_S = 2e4


@dataclass(frozen=True)
class ShareSpec:
    sms: int
    prefill: tuple[float, float, float, float] = (0.0, 0.0, 1e-3, 0.0)
    decode_small: tuple[float, float, float] = (0.0, 0.0, 1e-2)
    decode_large: tuple[float, float, float] = (0.0, 0.0, 1e-2)
    knots: tuple[tuple[float, float], ...] = ()
    floor_s_per_token: float = 0.0
    fused_shared_s: float = 0.0
    corun_prefill: float = 1.0
    corun_decode: float = 1.0
    guard: float = 1.0


@dataclass(frozen=True)
class ProfileSpec:
    """One PROFILE row with its SHARE rows, ascending in ``sms``; the last one is the whole device."""

    shares: tuple[ShareSpec, ...] = (ShareSpec(100),)
    n_layers: int = 8
    regime_bs: int = 1000
    kv_bytes_per_token: float = 1000.0
    step_overhead_s: float = 0.0
    ctx_overhead_s: float = 0.0
    migrate_latency_s: float = 0.0
    switch_s: float = 0.0
    switch_full: int = 0
    prefill_min_tokens: int = 0


@dataclass(frozen=True)
class RequestSpec:
    """``gap_s`` after the arrival before (roots), or ``think_s`` after the end of request ``follows``."""

    prompt: int
    output: int
    gap_s: float = 0.0
    cls: int = 0
    follows: int = -1
    think_s: float = 0.0
    ttft_slo_s: float = 0.0
    tpot_slo_s: float = 0.0
    family: int = 0  # roots of one family share their first ``shared`` hash entries,
    shared: int = 0  # a follow-up turn as many of those of the turn before it
    hashed: int = 0  # hash entries; those past the prompt stand for the answer


@dataclass(frozen=True)
class Case:
    instances: tuple[InstanceSpec, ...]
    requests: tuple[RequestSpec, ...]
    profiles: tuple[ProfileSpec, ...] = (ProfileSpec(),)
    classes: tuple[SloClass, ...] = (SloClass(10.0, 1.0),)
    links: tuple[LinkSpec, ...] = (LinkSpec(),)
    options: ClusterOptions = field(default_factory=ClusterOptions)
    jitter: tuple[float, ...] = ()  # factor on every true step time, per instance
    seed: int = 0
    hold: float = 0.0  # chance that the random policy holds, sheds or keeps where it may
    shed: float = 0.0
    keep: float = 0.5

    def build(self, *, fast_forward: bool = True, horizon_s: float = STUCK_S) -> tuple[ClusterState, Sim]:
        """The cluster and its clock at time zero."""
        profile, share = pack_profiles(self.profiles)
        req, hashes, n_roots = _requests(self)
        state = new_cluster(
            self.instances,
            profile,
            share,
            classes=self.classes,
            options=replace(self.options, horizon_s=horizon_s),
            links=self.links,
            n_requests=len(req),
            hashes=hashes,
        )
        state = state._replace(req=req)
        truth: dict[str, Any] = {}
        if self.jitter:
            rows = state.inst["profile"]
            factor = np.asarray(self.jitter)
            truth = {"true_profile": profile[rows].copy(), "true_share": share[rows].copy()}
            for name in ("prefill", "knot_s", "decode_small", "decode_large"):
                truth["true_share"][name] *= factor[:, None, None]
        return state, new_sim(state, n_roots=n_roots, fast_forward=fast_forward, **truth)


def pack_profiles(specs: tuple[ProfileSpec, ...]) -> tuple[np.ndarray, np.ndarray]:
    """PROFILE (n,) and SHARE (n, M); rows a profile does not have repeat its last one."""
    profile = np.zeros(len(specs), PROFILE)
    share = np.zeros((len(specs), max(len(p.shares) for p in specs)), SHARE)
    for p, spec in enumerate(specs):
        for name in (
            "n_layers", "regime_bs", "kv_bytes_per_token", "step_overhead_s", "ctx_overhead_s",
            "migrate_latency_s", "switch_s", "switch_full", "prefill_min_tokens",
        ):  # fmt: skip
            profile[p][name] = getattr(spec, name)
        profile[p]["n_shares"], profile[p]["total_sms"] = len(spec.shares), spec.shares[-1].sms
        for m in range(share.shape[1]):
            row = spec.shares[min(m, len(spec.shares) - 1)]
            for name in (
                "sms", "prefill", "decode_small", "decode_large", "floor_s_per_token", "fused_shared_s",
                "corun_prefill", "corun_decode", "guard",
            ):  # fmt: skip
                share[p, m][name] = getattr(row, name)
            share[p, m]["n_knots"] = len(row.knots)
            for k, (tokens, seconds) in enumerate(row.knots):
                share[p, m]["knot_tokens"][k], share[p, m]["knot_s"][k] = tokens, seconds
    return profile, share


def prefix_entry(owner: str, j: int) -> int:
    """Hash entry ``j`` of a prefix."""
    return int.from_bytes(hashlib.blake2b(f"{owner}/{j}".encode(), digest_size=8).digest(), "little")


def _requests(case: Case) -> tuple[np.ndarray, np.ndarray, int]:
    """REQUEST records (roots first, by arrival), their hashes, and the number of roots."""
    specs = case.requests
    order = [k for k, r in enumerate(specs) if r.follows < 0]
    n_roots = len(order)
    order += [k for k, r in enumerate(specs) if r.follows >= 0]
    at = {k: row for row, k in enumerate(order)}
    req = blank_requests(len(specs))
    entries: dict[int, list[int]] = {}
    hashes: list[int] = []
    now = 0
    for row, k in enumerate(order):
        spec = specs[k]
        if spec.follows < 0:
            now += round(spec.gap_s * TICKS_PER_S)
            req[row]["arrival"] = now
        else:
            parent = at[spec.follows]
            req[parent]["next_turn"] = row
            req[parent]["think"] = round(spec.think_s * TICKS_PER_S)
        for name in ("prompt", "output", "cls"):
            req[row][name] = getattr(spec, name)
        req[row]["ttft_slo"] = round(spec.ttft_slo_s * TICKS_PER_S)
        req[row]["tpot_slo"] = round(spec.tpot_slo_s * TICKS_PER_S)
        if case.options.hash_tokens and spec.hashed:
            req[row]["hash_off"], req[row]["hash_n"] = len(hashes), spec.hashed
            former = entries.get(spec.follows, [prefix_entry(f"family {spec.family}", j) for j in range(spec.shared)])
            entries[k] = former[: spec.shared]
            entries[k] += [prefix_entry(f"request {k}", j) for j in range(len(entries[k]), spec.hashed)]
            hashes += entries[k]
    return req, np.asarray(hashes or [0], np.uint64), n_roots


_tiny = st.sampled_from([0.0, 1e-8, 1e-6])
_small = st.sampled_from([0.0, 1e-6, 1e-5, 1e-4])
_medium = st.sampled_from([0.0, 1e-4, 3.3e-3, 2e-2])
_slower = st.sampled_from([1.0, 1.1, 1.7])


@st.composite
def _shares(draw: st.DrawFn) -> tuple[ShareSpec, ...]:
    rows = []
    for sms in sorted(draw(st.sets(st.integers(1, 100), min_size=1, max_size=4))):
        knots: tuple[tuple[float, float], ...] = ()
        if draw(st.integers(0, 3)) == 0:
            knots = ((0.0, draw(_medium)), (64.0, 2.1e-2), (256.0, 4e-2), (512.0, 1e-1))[: draw(st.integers(2, 4))]
        decode = (draw(_tiny), draw(_small), draw(_medium))
        large = decode if draw(st.booleans()) else (draw(_tiny), draw(_small), draw(_medium))
        rows.append(
            ShareSpec(
                sms,
                prefill=(draw(_tiny), draw(_tiny), draw(_small), draw(_medium)),
                decode_small=decode,
                decode_large=large,
                knots=knots,
                floor_s_per_token=draw(_tiny),
                fused_shared_s=draw(_medium),
                corun_prefill=draw(_slower),
                corun_decode=draw(_slower),
                guard=draw(_slower),
            )
        )
    return tuple(rows)


@st.composite
def _profiles(draw: st.DrawFn) -> ProfileSpec:
    return ProfileSpec(
        shares=draw(_shares()),
        n_layers=draw(st.sampled_from([1, 4, 32])),
        regime_bs=draw(st.integers(1, 6)),
        kv_bytes_per_token=draw(st.sampled_from([1.0, 1e5])),
        step_overhead_s=draw(_small),
        ctx_overhead_s=draw(_tiny),
        migrate_latency_s=draw(_medium),
        switch_s=draw(st.sampled_from([0.0, 0.05, 3.0])),
        switch_full=draw(st.integers(0, 1)),
        prefill_min_tokens=draw(st.sampled_from([0, 0, 100])),
    )


@st.composite
def _instances(draw: st.DrawFn, profiles: tuple[ProfileSpec, ...], block: int, links: int) -> tuple[InstanceSpec, ...]:
    n = draw(st.integers(1, 6))
    roles = draw(st.lists(st.sampled_from(list(Role)), min_size=n, max_size=n))
    # As a scenario demands: someone may prefill and someone may decode.
    if all(r == Role.PREFILL for r in roles) or all(r == Role.DECODE for r in roles):
        roles[0] = Role.MIXED
    pools = [0]
    for _ in range(n - 1):
        share_pool = draw(st.integers(0, 2)) == 0
        pools.append(draw(st.integers(0, max(pools))) if share_pool else max(pools) + 1)
    sizes = [block * draw(st.integers(3, 40)) for _ in range(max(pools) + 1)]
    specs = []
    for role, pool in zip(roles, pools, strict=True):
        p = draw(st.integers(0, len(profiles) - 1))
        specs.append(
            InstanceSpec(
                role=role,
                pool=pool,
                kv_tokens=sizes[pool],
                profile=p,
                gpu=pool,
                link=draw(st.integers(0, links - 1)),
                batching=draw(st.sampled_from(list(Batching))),
                chunk_tokens=draw(st.sampled_from([1, 7, 32, 128])),
                prefill_tokens=draw(st.sampled_from([1, 64, 300])),
                max_batch=draw(st.integers(1, 8)),
                max_prefills=draw(st.integers(1, 4)),
                max_ctx=draw(st.sampled_from([2**60, 2**60, 64])),
                split=draw(st.integers(min(Split), len(profiles[p].shares) - 1)),
                table=tuple((bs, draw(st.integers(0, len(profiles[p].shares) - 1))) for bs in (1, 3)),
                layer_tokens=draw(st.sampled_from([0, 0, 400])),
                stand_aside=draw(st.booleans()),
                order=draw(st.sampled_from(list(Order))),
                headroom=draw(st.sampled_from([0.5, 1.0])),
            )
        )
    return tuple(specs)


@st.composite
def _request_list(draw: st.DrawFn, n_classes: int, hash_tokens: int, max_requests: int) -> tuple[RequestSpec, ...]:
    specs: list[RequestSpec] = []
    free_parents: list[int] = []
    gap = draw(st.sampled_from([0.0, 1e-3, 0.03, 0.5]))
    for k in range(draw(st.integers(1, max_requests))):
        prompt = draw(st.integers(1, 40) | st.integers(1, 250) | st.just(2000))
        output = draw(st.integers(1, 4) | st.integers(1, 60) | st.just(700))
        follows = -1
        if free_parents and draw(st.integers(0, 3)) == 0:
            follows = free_parents.pop(draw(st.integers(0, len(free_parents) - 1)))
        hashed = shared = family = 0
        if hash_tokens:
            family = draw(st.integers(0, 2))
            hashed = draw(st.integers(0, (prompt + output) // hash_tokens))
            # Answers are never the same by chance, so nobody shares more than prompts.
            shared = draw(st.integers(0, min(hashed, prompt // hash_tokens)))
        specs.append(
            RequestSpec(
                prompt=prompt,
                output=output,
                gap_s=gap * draw(st.sampled_from([0.0, 1.0, 1.0, 3.7])),
                cls=draw(st.integers(0, n_classes - 1)),
                follows=follows,
                think_s=draw(st.sampled_from([0.0, 0.01, 1.0])),
                ttft_slo_s=draw(st.sampled_from([0.0, 0.0, 0.07])),
                tpot_slo_s=draw(st.sampled_from([0.0, 0.0, 0.013])),
                family=family,
                shared=shared,
                hashed=hashed,
            )
        )
        free_parents.append(k)
    return tuple(specs)


@st.composite
def cases(draw: st.DrawFn, *, max_requests: int = 24) -> Case:
    """A random cluster under random load."""
    profiles = tuple(draw(st.lists(_profiles(), min_size=1, max_size=2)))
    bandwidth = draw(st.sampled_from([0.0, 1e5, 1e9]))
    links = tuple(
        LinkSpec(bandwidth, draw(st.sampled_from([-1.0, 0.0, 0.011]))) for _ in range(draw(st.integers(1, 3)))
    )
    block = draw(st.sampled_from([4, 16]))
    instances = draw(_instances(profiles, block, len(links)))
    classes = tuple(
        SloClass(
            draw(st.sampled_from([0.01, 0.2, 5.0])),
            draw(st.sampled_from([1e-3, 0.02, 0.2])),
            draw(st.sampled_from([0.0, 3.0])),
            draw(st.sampled_from([1.0, 2.5])),
        )
        for _ in range(draw(st.integers(1, 3)))
    )
    hash_tokens = block * draw(st.sampled_from([0, 1, 2]))
    options = ClusterOptions(
        block_tokens=block,
        hash_tokens=hash_tokens,
        hold=draw(st.booleans()),
        shed=draw(st.booleans()),
        place_decode=draw(st.booleans()),
        reallocate=draw(st.booleans()),
        tune=draw(st.booleans()),
        at_once=draw(st.integers(1, 4)),
        hand_over=draw(st.booleans()),
        hold_s=draw(st.sampled_from([1e-3, 0.05, 1.0])),
        hold_scan=draw(st.integers(1, 8)),
        control_s=draw(st.sampled_from([0.2, 1.0])),
    )
    jitter = tuple(draw(st.sampled_from([0.8, 1.0, 1.13])) for _ in instances) if draw(st.booleans()) else ()
    return Case(
        instances=instances,
        requests=draw(_request_list(len(classes), hash_tokens, max_requests)),
        profiles=profiles,
        classes=classes,
        links=links,
        options=options,
        jitter=jitter,
        seed=draw(st.integers(1, 10**6)),
        hold=draw(st.sampled_from([0.1, 0.5])),
        shed=draw(st.sampled_from([0.0, 0.1])),
        keep=draw(st.sampled_from([0.3, 0.9])),
    )
