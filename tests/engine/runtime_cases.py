"""Random small clusters for tests of the runtime: all roles, shared pools, tight KV, slow links, sessions, prefixes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from engine.core.kinds import Batching, Role, Split
from engine.core.policy import POLICY_SIGNATURE
from engine.core.setup import ClusterOptions, InstanceSpec, LinkSpec, SloClass, blank_requests, new_cluster
from engine.core.state import ClusterState
from engine.latency.evaluate import PROFILE, SHARE

BLOCK = 16
TICKS_PER_MS = 10**9


def tables(*, shares: int = 1, layers: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """PROFILE (1,) and SHARE (1, shares) of a made-up device."""
    profile, share = np.zeros(1, PROFILE), np.zeros((1, shares), SHARE)
    profile["n_layers"], profile["n_shares"], profile["total_sms"] = layers, shares, 4 * shares
    profile["regime_bs"], profile["kv_bytes_per_token"] = 6, 1000.0
    profile["step_overhead_s"], profile["migrate_latency_s"] = 2e-4, 1e-3
    profile["switch_s"] = 0.02
    for k in range(shares):
        slower = shares / (k + 1)
        share[0, k]["sms"] = 4 * (k + 1)
        share[0, k]["prefill"] = np.array([1e-8, 1e-8, 5e-5, 1e-3]) * slower
        share[0, k]["decode_small"] = np.array([1e-7, 2e-4, 3e-3]) * slower
        share[0, k]["decode_large"] = np.array([1e-7, 1e-4, 4e-3]) * slower
        share[0, k]["fused_shared_s"] = 1e-3
        share[0, k]["corun_prefill"], share[0, k]["corun_decode"], share[0, k]["guard"] = 1.1, 1.2, 1.3
    return profile, share


class RandomPolicy:
    """Answers every decision with a random allowed candidate, compiled, from its own memory."""

    name, needs, arrangement = "random", 1, None

    def __init__(self, seed: int) -> None:
        self.params, self.memory = np.array([float(seed)]), np.zeros(1)
        self.decide = _random_answer

    def describe(self) -> dict[str, Any]:
        return {}


@njit(POLICY_SIGNATURE)
def _random_answer(context, candidates, mask, params, memory):
    memory[0] += 1.0
    x = np.uint64(memory[0]) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(params[0])
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    allowed = 0
    for k in range(len(mask)):
        allowed += mask[k]
    pick = np.int64((x >> np.uint64(33)) % np.uint64(allowed))
    for k in range(len(mask)):
        if mask[k]:
            if pick == 0:
                return k
            pick -= 1
    return -1


def random_specs(rng: np.random.Generator) -> list[InstanceSpec]:
    """One to five instances that can prefill and decode between them."""
    n = int(rng.integers(1, 6))
    while True:
        roles = [Role(int(r)) for r in rng.integers(0, 4, n)]
        if any(r != Role.DECODE for r in roles) and any(r != Role.PREFILL for r in roles):
            break
    specs, pool, kv = [], -1, 0
    one_link = bool(rng.integers(0, 2))
    for i, role in enumerate(roles):
        if pool < 0 or rng.random() < 0.7:
            pool, kv = pool + 1, BLOCK * int(rng.integers(12, 60))
        layered = role == Role.MULTIPLEXED and rng.random() < 0.6
        specs.append(
            InstanceSpec(
                role=role,
                pool=pool,
                kv_tokens=kv,
                link=0 if one_link else i,
                batching=Batching.LAYERED if layered else Batching(int(rng.integers(0, 2))),
                chunk_tokens=int(rng.integers(8, 100)),
                prefill_tokens=int(rng.integers(32, 400)),
                max_batch=int(rng.integers(2, 9)),
                max_prefills=int(rng.integers(1, 5)),
                order=int(rng.integers(0, 4)),
                split=int(rng.integers(min(Split), 2)),
                table=((1, int(rng.integers(0, 2))), (3, int(rng.integers(0, 2)))),
                layer_tokens=int(rng.choice([0, 300])),
                stand_aside=(i + n) % 2 == 1,  # not drawn, so that the clusters of old seeds stay what they were
            )
        )
    return specs


def random_requests(rng: np.random.Generator, n: int, limit: int) -> tuple[np.ndarray, int, np.ndarray]:
    """``n`` requests, the number of those that arrive by themselves, and their prefix hashes (uint64)."""
    req = blank_requests(n)
    roots = n - int(rng.integers(0, n // 3))
    gap_ms = float(rng.choice([0.3, 3.0, 20.0]))
    req["arrival"][:roots] = np.cumsum(np.rint(rng.exponential(gap_ms, roots))).astype(np.int64) * TICKS_PER_MS
    req["prompt"] = rng.integers(1, limit, n)
    req["output"] = rng.integers(1, 40, n)
    req["cls"] = rng.integers(0, 2, n)
    turns = rng.permutation(roots)[: n - roots]
    req["next_turn"][turns] = np.arange(roots, n)
    req["think"] = rng.integers(0, 5, n) * TICKS_PER_MS
    room = (limit + 40) // BLOCK
    groups = rng.integers(1, 2**60, (4, room)).astype(np.uint64)
    own = rng.integers(1, 2**60, (n, room)).astype(np.uint64)
    for r in range(n):  # the first blocks are shared within a group
        shared = int(rng.integers(0, room))
        own[r, :shared] = groups[r % 4, :shared]
        req["hash_off"][r] = r * room
    req["hash_n"] = np.minimum((req["prompt"] + req["output"]) // BLOCK, room)
    return req, roots, own.ravel()


def random_cluster(seed: int, n_requests: int = 30) -> tuple[ClusterState, int]:
    """A cluster with requests, and how many of them arrive by themselves. The same seed gives the same arrays."""
    rng = np.random.default_rng(seed)
    specs = random_specs(rng)
    limit = min(s.kv_tokens for s in specs) - 45
    req, roots, hashes = random_requests(rng, n_requests, limit)
    profile, share = tables(shares=3)
    profile["switch_full"] = int(rng.integers(0, 2))
    flags = [bool(x) for x in rng.integers(0, 2, 5)]
    at_once, hand_over = np.random.default_rng([seed, 2]).integers(0, 2, 2)
    options = ClusterOptions(
        hash_tokens=BLOCK if rng.random() < 0.7 else 0,
        hold=flags[0],
        shed=flags[1],
        place_decode=flags[2],
        reallocate=flags[3],
        tune=flags[4],
        at_once=1 + 2 * int(at_once),
        hand_over=bool(hand_over),
        hold_s=0.004,
        hold_scan=2,
        control_s=0.05,
        horizon_s=60.0,
    )
    if options.hash_tokens == 0:
        req["hash_n"] = 0
    speed = float(rng.choice([0.0, 1e6, 1e8]))
    state = new_cluster(
        specs,
        profile,
        share,
        classes=[SloClass(0.05, 0.006), SloClass(0.01, 0.02, ttft_factor=3.0, weight=2.0)],
        options=options,
        links=[LinkSpec(speed, -1.0 if rng.random() < 0.5 else 2e-3) for _ in specs],
        n_requests=n_requests,
        hashes=hashes,
    )
    return state._replace(req=req), roots


def crowded_cluster(seed: int) -> tuple[ClusterState, int]:
    """A random cluster of layered instances: short prompts in a hurry meet long prefills that may stand aside."""
    state, roots = random_cluster(seed)
    rng = np.random.default_rng([seed, 1])
    state.inst["role"], state.inst["batching"], state.inst["stand_aside"] = Role.MULTIPLEXED, Batching.LAYERED, 1
    state.inst["split"][state.inst["split"] == Split.ON_DEMAND] = Split.AUTO
    state.inst["prefill_tokens"], state.inst["max_batch"] = 1, state.run.shape[1]
    state.profile["n_layers"] = 12
    state.share["prefill"] *= 3.0
    req = state.req
    short = rng.random(len(req)) < 0.6
    req["prompt"][short] = np.maximum(req["prompt"][short] // 10, 1)
    req["hash_n"] = np.minimum(req["hash_n"], (req["prompt"] + req["output"]) // BLOCK)
    hurry = rng.integers(10, 60, len(req)) * TICKS_PER_MS
    req["ttft_slo"] = np.where(short, hurry, 3000 * TICKS_PER_MS)
    return state, roots
