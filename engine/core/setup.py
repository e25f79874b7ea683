"""Build the arrays of a cluster from a plain description; the only part of the core that allocates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum

import numpy as np

from engine.core.kinds import Batching, Order, Role, Split
from engine.core.lists import n_lists
from engine.core.policy import InstancePlan
from engine.core.slo import ITL_BINS
from engine.core.state import (
    BLOCK,
    CACHED,
    CLUSTER,
    INSTANCE,
    LANE,
    LINK,
    MAX_TABLE,
    NEVER,
    POOL,
    REQUEST,
    SLO_CLASS,
    ClusterState,
)
from engine.errors import SlalomError
from engine.latency.evaluate import FOREVER, TICKS_PER_S, to_ticks

NO_LIMIT = 2**60
#: Control and hold intervals below this would leave no time for anything else.
LEAST_INTERVAL_S = 1e-5
#: The books of a cluster (not its KV) take no more; a thousand instances of a million tokens each take 3.
MOST_BYTES = 4 * 2**30


@dataclass(frozen=True)
class InstanceSpec:
    """One instance. Instances with the same ``pool`` index share its KV blocks (they sit on one GPU)."""

    role: Role
    pool: int
    kv_tokens: int  # capacity of its pool, tokens
    profile: int = 0
    gpu: int = 0
    link: int = 0
    batching: Batching = Batching.CHUNKED
    chunk_tokens: int = 512
    prefill_tokens: int = 8192
    max_batch: int = 256
    max_prefills: int = 128
    max_ctx: int = NO_LIMIT
    rotate: bool = False  # whom max_ctx left out goes first in the next step
    split: int = Split.AUTO
    table: tuple[tuple[int, int], ...] = ()  # Split.TABLE: (least decode batch size, share row), ascending
    layer_tokens: int = 0
    stand_aside: bool = False  # LAYERED: a batch may stand aside between layers for a short prompt
    order: int = Order.FCFS
    headroom: float = 1.0
    watermark: float = 0.01  # vLLM V1: 0
    whole_prompt: bool = False  # vLLM: scheduler_reserve_full_isl
    pause_preempt: bool = False  # vLLM V1: True
    remote: bool = False  # an engine of others, in front of which Slalom only routes


@dataclass(frozen=True)
class LinkSpec:
    """A path that KV travels on, one transfer at a time.

    ``bytes_per_s`` 0 means free; ``latency_s`` below 0 means that of the receiver's profile.
    """

    bytes_per_s: float = 0.0
    latency_s: float = -1.0


@dataclass(frozen=True)
class SloClass:
    """Targets of one class: TTFT = max(ttft_s, ttft_factor × isolated prefill time), TPOT = tpot_s."""

    ttft_s: float
    tpot_s: float
    ttft_factor: float = 0.0
    weight: float = 1.0


@dataclass(frozen=True)
class ClusterOptions:
    """Which decisions are asked, and how often."""

    block_tokens: int = 16
    hash_tokens: int = 0
    hold: bool = False
    shed: bool = False
    place_decode: bool = False
    reallocate: bool = False
    tune: bool = False
    roles: Sequence[Role] = tuple(Role)
    min_prefill: int = 1
    min_decode: int = 1
    at_once: int = 1  # role changes under way at the same time
    hand_over: bool = False  # a role change hands running decodes to other instances; else it waits for their end
    hold_s: float = 0.05
    hold_scan: int = 8
    hold_limit_s: float = 10.0
    tail_factor: float = 10.0  # no first token later than so many TTFT targets, where that is possible
    control_s: float = 1.0
    horizon_s: float = 0.0  # 0: run until every request has ended


def blank_requests(n: int) -> np.ndarray:
    """``n`` requests in state NEW with every stamp and link unset; REQUEST (n,)."""
    req = np.zeros(n, REQUEST)
    for name in ("placed", "prefill_start", "first_token", "last_token", "finished", "arrival"):
        req[name] = -1
    for name in ("tail", "dst_tail", "next", "prev", "inst", "dest", "next_turn", "first_inst"):
        req[name] = -1
    req["ttft_ok"] = req["tpot_ok"] = -1
    return req


def _pools(specs: Sequence[InstanceSpec], block_tokens: int) -> tuple[np.ndarray, ...]:
    pool = np.zeros(max(s.pool for s in specs) + 1, POOL)
    base, bucket_base = 0, 0
    sharing: dict[int, list[InstanceSpec]] = {}
    for spec in specs:
        sharing.setdefault(spec.pool, []).append(spec)
    for p in range(len(pool)):
        members = sharing.get(p)
        if not members:
            raise SlalomError(f"cluster: pool {p}", "no instance", "number the pools without gaps")
        n = members[0].kv_tokens // block_tokens
        if n < 2:
            raise SlalomError("kv_tokens", members[0].kv_tokens, f"give at least two blocks of {block_tokens} tokens")
        buckets = 1 << max(n - 1, 1).bit_length()
        pool[p]["base"], pool[p]["n_blocks"], pool[p]["free"] = base, n, n
        pool[p]["spare_n"], pool[p]["lru_head"], pool[p]["lru_tail"] = n, -1, -1
        pool[p]["bucket_base"], pool[p]["n_buckets"] = bucket_base, buckets
        pool[p]["sharers"] = len(members)
        base, bucket_base = base + n, bucket_base + buckets
    block = np.zeros(base, BLOCK)
    block["parent"] = -1
    # Reversed, so that a fresh pool hands out its blocks in ascending order.
    spare = np.concatenate([np.arange(int(p["base"] + p["n_blocks"]) - 1, int(p["base"]) - 1, -1) for p in pool])
    return pool, block, spare, np.full(bucket_base, -1, np.int32)


def _check_size(specs: Sequence[InstanceSpec], options: ClusterOptions) -> None:
    """:raises SlalomError: the arrays of such a cluster would fill the memory"""
    blocks = sum({s.pool: s.kv_tokens // options.block_tokens for s in specs}.values())
    places = len(specs) * (max(s.max_batch for s in specs) + 2 * max(s.max_prefills for s in specs))
    size = blocks * (BLOCK.itemsize + CACHED.itemsize + 16) + 4 * places
    if size > MOST_BYTES:
        shown = f"{len(specs)} instances, {blocks} KV blocks, {places} places for requests: {size / 2**30:.1f} GiB"
        fix = f"at most {MOST_BYTES >> 30} GiB: take fewer instances, a smaller kv_tokens, max_batch or max_prefills"
        raise SlalomError("cluster", shown, fix)


def _instances(specs: Sequence[InstanceSpec]) -> np.ndarray:
    inst = np.zeros(len(specs), INSTANCE)
    for record, spec in zip(inst, specs, strict=True):
        for name in (
            "role", "pool", "profile", "gpu", "link", "batching", "chunk_tokens", "prefill_tokens",
            "max_batch", "max_prefills", "max_ctx", "rotate", "split", "layer_tokens", "stand_aside", "order",
            "headroom", "watermark", "whole_prompt", "pause_preempt", "remote",
        ):  # fmt: skip
            record[name] = getattr(spec, name)
        record["table_n"] = len(spec.table)
        for k, (least, row) in enumerate(spec.table):
            record["table_bs"][k], record["table_row"][k] = least, row
        multiplexed = spec.role == Role.MULTIPLEXED
        record["batching_after"] = Batching.CHUNKED if multiplexed else Batching.LAYERED
        record["target_role"] = -1
        record["last_decode_end"] = -1
    return inst


def _check_split(where: str, spec: InstanceSpec, n_shares: int) -> None:
    if not min(Split) <= spec.split < n_shares:
        raise SlalomError(f"{where}.split", spec.split, f"the profile has {n_shares} share rows")
    if spec.split == Split.TABLE and not 0 < len(spec.table) <= MAX_TABLE:
        raise SlalomError(f"{where}.table", len(spec.table), f"give 1 to {MAX_TABLE} rows")
    least = [bs for bs, _ in spec.table]
    if least != sorted(least) or any(not 0 <= row < n_shares for _, row in spec.table):
        fix = f"give (least decode batch size, share row) by batch size, rows below {n_shares}"
        raise SlalomError(f"{where}.table", spec.table, fix)


def arranged(spec: InstanceSpec, plan: InstancePlan) -> InstanceSpec:
    """``spec`` after a policy's own arrangement of it; a role that it changes brings its usual batching along."""
    given = {f.name: getattr(plan, f.name) for f in fields(plan) if getattr(plan, f.name) is not None}
    kinds: dict[str, type[IntEnum]] = {"role": Role, "batching": Batching}  # a checkpoint gives plain numbers
    given |= {name: kind(given[name]) for name, kind in kinds.items() if name in given}
    role = given.get("role", spec.role)
    if role == Role.MULTIPLEXED and role != spec.role:
        given.setdefault("batching", Batching.LAYERED)
    elif role == Role.MIXED and given.get("batching", spec.batching) == Batching.LAYERED:
        given["batching"] = Batching.CHUNKED
    return replace(spec, **given)


def _cluster(specs: Sequence[InstanceSpec], options: ClusterOptions, n_requests: int, links: int) -> np.ndarray:
    c = np.zeros(1, CLUSTER)
    c["n_instances"], c["n_requests"], c["n_links"] = len(specs), n_requests, links
    c["n_pools"] = max(s.pool for s in specs) + 1
    c["block_tokens"], c["hash_tokens"] = options.block_tokens, options.hash_tokens
    c["allow_hold"], c["allow_shed"] = options.hold, options.shed
    c["ask_decode"], c["ask_realloc"], c["ask_tune"] = options.place_decode, options.reallocate, options.tune
    c["roles_allowed"] = sum(1 << int(r) for r in options.roles)
    c["min_prefill"], c["min_decode"] = options.min_prefill, options.min_decode
    c["at_once"], c["hand_over"] = options.at_once, options.hand_over
    for name in ("hold_s", "control_s"):
        if not getattr(options, name) >= LEAST_INTERVAL_S:
            fix = f"give at least {LEAST_INTERVAL_S:g} seconds: something is done each time"
            raise SlalomError(name, getattr(options, name), fix)
    c["hold_ticks"], c["hold_scan"] = to_ticks(options.hold_s), options.hold_scan
    c["hold_limit"], c["hold_due"] = to_ticks(options.hold_limit_s), NEVER
    c["tail_factor"] = options.tail_factor
    c["control_ticks"] = to_ticks(options.control_s)
    c["horizon_ticks"] = NEVER
    if options.horizon_s > 0:
        c["horizon_ticks"] = np.rint(min(options.horizon_s * TICKS_PER_S, 2.0 * FOREVER)).astype(np.int64)
    c["tune_next"] = -1
    c["ema_ttft_ok"] = c["ema_tpot_ok"] = 1.0
    return c


def new_cluster(
    specs: Sequence[InstanceSpec],
    profile: np.ndarray,
    share: np.ndarray,
    *,
    classes: Sequence[SloClass],
    options: ClusterOptions | None = None,
    links: Sequence[LinkSpec] = (LinkSpec(),),
    n_requests: int = 0,
    hashes: np.ndarray | None = None,
) -> ClusterState:
    """An idle cluster at time zero.

    :param specs: the instances, N of them
    :param profile: PROFILE (n,) and ``share`` SHARE (n, M), as ``engine.latency.pack`` gives them
    :param classes: SLO classes
    :param links: KV paths; ``InstanceSpec.link`` indexes them
    :param n_requests: request slots to allocate
    :param hashes: chained prefix hashes of all requests, uint64
    :raises SlalomError: on an empty cluster, a pool without blocks, or an index that points nowhere
    """
    options = options or ClusterOptions()
    if not specs:
        raise SlalomError("cluster.instances", 0, "name at least one instance")
    for k, spec in enumerate(specs):
        if not 0 <= spec.profile < len(profile):
            raise SlalomError(f"instances[{k}].profile", spec.profile, f"only {len(profile)} profiles were given")
        if not 0 <= spec.link < len(links):
            raise SlalomError(f"instances[{k}].link", spec.link, f"only {len(links)} links were given")
        _check_split(f"instances[{k}]", spec, int(profile[spec.profile]["n_shares"]))
    _check_size(specs, options)
    if not options.tail_factor >= 1.0:
        raise SlalomError("tail_factor", options.tail_factor, "give 1 or more: TTFT targets that anybody may wait")
    if options.hash_tokens % options.block_tokens:
        raise SlalomError("hash_tokens", options.hash_tokens, f"use a multiple of {options.block_tokens}")
    pool, block, spare, bucket = _pools(specs, options.block_tokens)
    link = np.zeros(len(links), LINK)
    link["bytes_per_s"] = [x.bytes_per_s for x in links]
    link["latency_s"] = [x.latency_s for x in links]
    cls = np.zeros(len(classes), SLO_CLASS)
    for record, c in zip(cls, classes, strict=True):
        for name in ("weight", "ttft_s", "ttft_factor", "tpot_s"):
            record[name] = getattr(c, name)
    lists = np.full((n_lists(len(specs), len(links)), 3), -1, np.int32)
    lists[:, 2] = 0
    cluster = _cluster(specs, options, n_requests, len(links))
    cluster["n_classes"] = len(classes)
    return ClusterState(
        cluster=cluster,
        inst=_instances(specs),
        lane=np.zeros((len(specs), 2), LANE),
        req=blank_requests(n_requests),
        pool=pool,
        block=block,
        cached=np.zeros(len(block) if options.hash_tokens else 1, CACHED),
        spare=spare.astype(np.int32),
        bucket=bucket,
        link=link,
        lists=lists,
        cls=cls,
        run=np.full((len(specs), max(s.max_batch for s in specs)), -1, np.int32),
        prefills=np.full((2 * len(specs), max(s.max_prefills for s in specs)), -1, np.int32),
        hashes=np.zeros(1, np.uint64) if hashes is None else np.ascontiguousarray(hashes, np.uint64),
        profile=profile,
        share=share,
        due=np.full((len(specs), len(classes)), NEVER, np.int64),
        watch=np.full(len(specs), NEVER, np.float64),
        turn=np.full(len(specs), NEVER, np.float64),
        itl=np.zeros(ITL_BINS, np.int64),
    )


assert TICKS_PER_S == 10**12
