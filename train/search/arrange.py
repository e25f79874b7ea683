"""Arrangements that the direct search tries: which instance does what, within which budgets, in which order."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np

from engine.core.kinds import Batching, Order, Role
from engine.core.policy import InstancePlan
from policies.setting import Setting

ORDERS = (Order.FCFS, Order.SHORTEST, Order.ON_TIME)  # of a prefill queue
_CHUNK, _PREFILL = 512, 2048  # budgets in tokens where nothing better is known
_IN_TIME = 0.7  # share of the longest chunk in time that leaves room for a larger decode batch


def _chunk_in_time(setting: Setting) -> float:
    """Prompt tokens with which a fused step takes as long as the tightest TPOT target allows, beside 32 sequences."""
    profile = setting.profile[0]
    share = setting.share[0][int(profile["n_shares"]) - 1]
    _, _, per_token, fixed = share["prefill"]
    _, per_sequence, step = share["decode_small"]
    rest = fixed + step + 32 * per_sequence + profile["step_overhead_s"] - share["fused_shared_s"]
    tightest = min(target.tpot_s for target in setting.classes)
    return float((tightest - rest) / max(per_token, share["floor_s_per_token"], 1e-9))


def _random_plan(role: Role, setting: Setting, rng: np.random.Generator) -> InstancePlan:
    order = int(rng.choice(ORDERS))
    chunk, prefill = int(2 ** rng.uniform(7, 13)), int(2 ** rng.uniform(9, 14))
    in_time = _chunk_in_time(setting)
    if in_time >= 64 and rng.random() < 0.6:  # what works is a narrow band: a longer step misses every target
        chunk = int(np.clip(in_time * 2 ** rng.uniform(-1.0, 0.2), 64, 8192))
    if role is Role.DECODE:  # its chunks matter where a policy lets it prefill
        return InstancePlan(role=role, chunk_tokens=chunk, prefill_tokens=prefill, order=order)
    if role is Role.PREFILL:
        return InstancePlan(role=role, prefill_tokens=prefill, order=order)
    if role is Role.MIXED:
        batching = Batching.CHUNKED if rng.random() < 0.8 else Batching.PREFILL_FIRST
        return InstancePlan(role=role, chunk_tokens=chunk, prefill_tokens=prefill, batching=batching, order=order)
    headroom = float(rng.uniform(0.6, 1.2))
    return InstancePlan(
        role=role, split=-1, headroom=headroom, prefill_tokens=prefill, chunk_tokens=chunk,
        batching=Batching.LAYERED, order=order,
    )  # fmt: skip


def random_plans(setting: Setting, rng: np.random.Generator) -> tuple[InstancePlan, ...] | None:
    """The scenario's own arrangement, one role for all, or two groups of different roles or budgets."""
    roles = _roles(setting)
    n = setting.n_instances
    draw = rng.random()
    if draw < 0.1:
        return None
    whole = [role for role in roles if role not in (Role.PREFILL, Role.DECODE)]
    if whole and (draw < 0.4 or n < 2):
        return (_random_plan(whole[int(rng.integers(len(whole)))], setting, rng),) * n
    while True:
        first, second = (roles[int(rng.integers(len(roles)))] for _ in range(2))
        if {first, second} not in ({Role.PREFILL}, {Role.DECODE}):
            break
    size = int(rng.integers(1, n))
    return (_random_plan(first, setting, rng),) * size + (_random_plan(second, setting, rng),) * (n - size)


def _roles(setting: Setting) -> list[Role]:
    shares = int(setting.profile["n_shares"].min()) > 1
    roles = [Role.MIXED, Role.PREFILL, Role.DECODE, *([Role.MULTIPLEXED] if shares else [])]
    return [role for role in roles if role in setting.usable_roles]


def composed(setting: Setting) -> list[tuple[InstancePlan, ...]]:
    """One role for all, and every two roles in up to five proportions (both ways round where instances differ), with
    plain budgets; queues on time and in order of arrival. Random draws may miss the right one, and who does what
    decides more than anything else."""
    in_time = _chunk_in_time(setting)
    chunk = int(np.clip(_IN_TIME * in_time, 64, 8192)) if in_time >= 64 else _CHUNK
    n, roles = setting.n_instances, _roles(setting)
    sizes = sorted({max(1, min(n - 1, round(n * share))) for share in (0.125, 0.25, 0.5, 0.75, 0.875)}) if n > 1 else []
    found = []
    for order in (int(Order.ON_TIME), int(Order.FCFS)):
        plans = {
            Role.PREFILL: InstancePlan(role=Role.PREFILL, prefill_tokens=_PREFILL, order=order),
            Role.DECODE: InstancePlan(role=Role.DECODE, chunk_tokens=chunk, prefill_tokens=_PREFILL, order=order),
            Role.MIXED: InstancePlan(
                role=Role.MIXED, chunk_tokens=chunk, prefill_tokens=_PREFILL, batching=Batching.CHUNKED, order=order
            ),
            Role.MULTIPLEXED: InstancePlan(
                role=Role.MULTIPLEXED, split=-1, headroom=1.0, prefill_tokens=_PREFILL, chunk_tokens=chunk,
                batching=Batching.LAYERED, order=order,
            ),
        }  # fmt: skip
        found += [(plans[role],) * n for role in roles if role not in (Role.PREFILL, Role.DECODE)]
        for first, second in (combinations if setting.is_uniform else permutations)(roles, 2):
            found += [(plans[first],) * size + (plans[second],) * (n - size) for size in sizes]
    return found
