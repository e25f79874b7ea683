"""Static arrangements that several rules start from: a prefill/decode split, or every instance mixed."""

from __future__ import annotations

from collections.abc import Sequence

from engine.core.kinds import Batching, Role
from engine.core.policy import InstancePlan
from engine.errors import SlalomError
from policies.setting import Setting

__all__ = ["all_mixed", "prefill_decode_split", "resized"]


def prefill_decode_split(
    setting: Setting, prefill_fraction: float, prefill_tokens: int, rule: str
) -> list[InstancePlan]:
    """The first ``round(fraction × n)`` instances prefill, the others decode; each side gets at least one.

    :raises SlalomError: fewer than two instances
    """
    n = setting.n_instances
    if n < 2:
        raise SlalomError(f"{rule}: instances", n, "a prefill/decode split needs at least two instances")
    n_prefill = min(max(round(prefill_fraction * n), 1), n - 1)
    prefill = InstancePlan(role=Role.PREFILL, prefill_tokens=prefill_tokens)
    return [prefill] * n_prefill + [InstancePlan(role=Role.DECODE)] * (n - n_prefill)


def all_mixed(setting: Setting, chunk_tokens: int) -> list[InstancePlan]:
    """Every instance runs fused steps of at most ``chunk_tokens`` tokens (chunked prefill)."""
    plan = InstancePlan(role=Role.MIXED, chunk_tokens=chunk_tokens, batching=Batching.CHUNKED)
    return [plan] * setting.n_instances


def resized(plans: Sequence[InstancePlan], n: int) -> list[InstancePlan]:
    """The arrangement for ``n`` instances: the same shares of every plan as nearly as ``n`` allows, in the same
    order, with at least one instance that prefills and one that decodes wherever the original has them.

    ``plans`` with a role left to the scenario are taken as they are.
    """
    if len(plans) == n:
        return list(plans)
    chosen = [plans[int((k + 0.5) * len(plans) / n)] for k in range(n)]
    for unable, first in ((Role.DECODE, True), (Role.PREFILL, False)):
        if all(plan.role == unable for plan in chosen):
            able = [plan for plan in plans if plan.role != unable]
            if able:
                chosen[0 if first else -1] = able[0]
    return chosen
