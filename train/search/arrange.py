"""Arrangements that the direct search tries: which instance does what, within which budgets, in which order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from itertools import combinations, product
from math import prod
from typing import Any

import numpy as np

from engine.core.kinds import Batching, Order, Role
from engine.core.policy import InstancePlan
from policies.setting import Setting

ORDERS = (Order.FCFS, Order.SHORTEST, Order.ON_TIME)  # of a prefill queue
_CHUNK, _PREFILL = 512, 2048  # budgets in tokens where nothing better is known
_IN_TIME = 0.7  # share of the longest chunk in time that leaves room for a larger decode batch
_MOST = 64  # compositions of a fleet of several kinds of instance; beyond, each kind is split in coarser steps


def _chunk_in_time(setting: Setting, p: int = 0) -> float:
    """Prompt tokens with which a fused step on profile ``p`` takes as long as the tightest TPOT target allows, beside
    32 sequences."""
    profile = setting.profile[p]
    share = setting.share[p][int(profile["n_shares"]) - 1]
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
    """Who may do what, with plain budgets; queues on time and in order of arrival. Random draws may miss the right one,
    and who does what decides more than anything else.

    Of equal instances: one role for all, and every two roles in up to five proportions. Of several kinds: of each some
    prefill, and the others all decode, or are mixed or multiplexed, all of one kind alike.
    """
    found = []
    for order in (Order.ON_TIME, Order.FCFS):
        plain = [_plain_plans(setting, p, int(order)) for p in setting.profile_of]
        for roles in _alike(setting) if setting.is_uniform else _by_kind(setting):
            found.append(tuple(plans[role] for plans, role in zip(plain, roles, strict=True)))
    return found


def _plain_plans(setting: Setting, p: int, order: int) -> dict[Role, InstancePlan]:
    """Of every role, with the chunk that profile ``p`` computes in time."""
    in_time = _chunk_in_time(setting, p)
    chunk = int(np.clip(_IN_TIME * in_time, 64, 8192)) if in_time >= 64 else _CHUNK
    return {
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


def _alike(setting: Setting) -> Iterator[tuple[Role, ...]]:
    """Roles of equal instances."""
    n, roles = setting.n_instances, _roles(setting)
    sizes = sorted({max(1, min(n - 1, round(n * share))) for share in (0.125, 0.25, 0.5, 0.75, 0.875)}) if n > 1 else []
    yield from ((role,) * n for role in roles if role not in (Role.PREFILL, Role.DECODE))
    for first, second in combinations(roles, 2):
        yield from ((first,) * size + (second,) * (n - size) for size in sizes)


def _by_kind(setting: Setting) -> Iterator[tuple[Role, ...]]:
    """Roles of instances of several kinds."""
    kinds = list(zip(setting.profile_of, setting.kv_tokens, setting.max_batch, strict=True))
    return roles_by_kind(kinds, dict.fromkeys(kinds, _roles(setting)), _MOST)


def roles_by_kind(
    kinds: Sequence[Hashable], usable: Mapping[Any, Collection[Role]], most: int
) -> Iterator[tuple[Role, ...]]:
    """Roles of instances of the given ``kinds``: of each some prefill; the others decode only everywhere, or are mixed
    or multiplexed, all of one kind alike. Those come first.

    :param usable: roles that instances of a kind may have
    :param most: about so many; more kinds or instances are split in coarser steps
    """
    counts = Counter(kinds)
    for parts in range(max(counts.values()), 0, -1):
        choices = [
            [list(_of_kind(n, [role for role in sides if role in usable[kind]], usable[kind], parts))
             for kind, n in counts.items()]
            for sides in ((Role.MIXED, Role.MULTIPLEXED), (Role.DECODE,))
        ]  # fmt: skip
        if sum(prod(map(len, each)) for each in choices) <= most:
            break
    for chosen in (each for compositions in choices for each in product(*compositions)):
        if {role for roles in chosen for role in roles} not in ({Role.PREFILL}, {Role.DECODE}):
            left = {kind: iter(roles) for kind, roles in zip(counts, chosen, strict=True)}
            yield tuple(next(left[kind]) for kind in kinds)


def _of_kind(n: int, sides: Sequence[Role], usable: Collection[Role], parts: int) -> Iterator[tuple[Role, ...]]:
    """Up to ``parts`` + 1 numbers of ``n`` equal instances prefill only, the others are all one of ``sides``."""
    numbers = {round(n * part / parts) for part in range(parts + 1)} if Role.PREFILL in usable else {0}
    for prefill in sorted(numbers):
        if prefill == n:
            yield (Role.PREFILL,) * n
        else:
            yield from ((Role.PREFILL,) * prefill + (role,) * (n - prefill) for role in sides)
