"""Fleets of several kinds of instance: which of them does what, each on its own latency profile.

Where instances differ in tensor parallelism alone, a plan may trade them: the same GPUs make others. Two A100 and two
H100 make nothing but themselves, so there a plan keeps every instance, its profile and its GPUs, and chooses roles:
of each kind some prefill only; the others decode only everywhere, or are mixed or multiplexed, all of one kind alike.
Who only decodes stands beside nobody mixed: least predicted TTFT, which places prompts there, would prefill on it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from engine.core.kinds import Role
from engine.errors import SlalomError
from env.scenario import Scenario
from env.sections import InstanceGroup
from train.search.arrange import roles_by_kind

_MOST = 128  # layouts of one fleet; a larger fleet is split in coarser steps


def kinds_of(scenario: Scenario) -> list[tuple[str, int]]:
    """(profile as the scenario names it, KV capacity in tokens) of every group of instances."""
    profiles = dict(zip(scenario.profile_names(), scenario.load_profiles(), strict=True))
    named = [(group.profile or scenario.profile, group.kv_tokens) for group in scenario.cluster]
    return [(name, kv_tokens or profiles[name].kv_tokens) for name, kv_tokens in named]


def is_tradable(scenario: Scenario) -> bool:
    """Whether its instances differ in tensor parallelism alone, so that the same GPUs may make others."""
    profiles = dict(zip(scenario.profile_names(), scenario.load_profiles(), strict=True))
    kinds = [profiles[name] for name, _ in dict.fromkeys(kinds_of(scenario))]
    return len({(p.model, p.device, p.engine) for p in kinds}) == 1 and len({p.tp for p in kinds}) == len(kinds)


def check_plannable(scenario: Scenario) -> None:
    """:raises SlalomError: a fleet of several kinds with instances that share a GPU: they could not part"""
    shared = [i for i, group in enumerate(scenario.cluster) if group.share_gpu]
    if shared and not is_tradable(scenario):
        fix = "a plan of several kinds of instance gives each GPUs of its own; leave share_gpu or static_plan out"
        raise SlalomError(f"{scenario.name}: cluster.{shared[0]}.share_gpu", True, fix)


def layouts(scenario: Scenario) -> Iterator[tuple[InstanceGroup, ...]]:
    """Who does what, with default budgets, of roles that the scenario allows; all of one further role first.

    Instances stay in the scenario's order, in which engines are given too.

    :raises SlalomError: see :func:`check_plannable`
    """
    check_plannable(scenario)
    instances = list(_instances(scenario))
    usable = {kind: _usable(scenario, kind[0]) for kind, _ in instances}
    for roles in roles_by_kind([kind for kind, _ in instances], usable, _MOST):
        groups = (group for _, group in instances)
        named = (g.model_copy(update={"role": role.name.lower()}) for g, role in zip(groups, roles, strict=True))
        alike = (list(same) for _, same in groupby(named))
        yield tuple(same[0].model_copy(update={"count": len(same)}) for same in alike)


def _instances(scenario: Scenario) -> Iterator[tuple[tuple[str, int], InstanceGroup]]:
    """Every instance, as (kind, group of one with the limits of its kind and default budgets)."""
    kinds = kinds_of(scenario)
    most = {kind: max(g.max_batch for k, g in zip(kinds, scenario.cluster, strict=True) if k == kind) for kind in kinds}
    for kind, group in zip(kinds, scenario.cluster, strict=True):
        one = InstanceGroup(
            count=1, role="mixed", profile=kind[0], max_batch=most[kind], max_prefills=group.max_prefills,
            kv_tokens=group.kv_tokens,
        )  # fmt: skip
        yield from [(kind, one)] * group.count


def _usable(scenario: Scenario, profile: str) -> list[Role]:
    """Roles that instances on ``profile`` may have; only SM shares let one multiplex."""
    shares = len(scenario.load_profiles()[scenario.profile_names().index(profile)].shares)
    found = [Role[name.upper()] for name in scenario.usable_roles()]
    return [role for role in found if shares > 1 or role is not Role.MULTIPLEXED]
