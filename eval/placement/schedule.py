"""Role changes at given times: what a placement that is planned anew asks of DistServe's cluster.

No rule of its own (nobody knows the times beforehand): :func:`scheduled` makes the policy with which
``eval.placement.replan`` measures a timeline of plans. Placement is DistServe's; at every REALLOCATE one instance, the
least loaded of its profile, changes its role while the split differs from the plan in force.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.core.columns import Col, Ctx, Kind, Need
from engine.core.kinds import Role
from engine.core.policy import POLICY_SIGNATURE, InstancePlan
from engine.jit.kernel import kernel
from policies.common import hold, kind_of
from policies.rule import BoundPolicy
from policies.rules.distserve import decide as place
from policies.rules.parts.planner import flip

_PREFILL, _DECODE = int(Role.PREFILL), int(Role.DECODE)
_HEAD = 3  # params before the first plan: DistServe's queue, number of profiles, number of plans


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: 0, profiles, plans; then for each plan its time in seconds and prefill instances by profile."""
    if kind_of(context) != Kind.REALLOCATE:
        return place(context, candidates, mask, params, memory)
    profiles, plans = int(params[1]), int(params[2])
    at = _HEAD
    for k in range(1, plans):
        if params[_HEAD + k * (1 + profiles)] <= context[Ctx.NOW_S]:
            at = _HEAD + k * (1 + profiles)
    for profile in range(profiles):
        have = 0
        for k in range(candidates.shape[0]):
            here = candidates[k, Col.INSTANCE] >= 0.0 and int(candidates[k, Col.PROFILE]) == profile
            prefills = int(candidates[k, Col.ROLE]) == _PREFILL and int(candidates[k, Col.NEW_ROLE]) == _DECODE
            have += 1 if here and prefills else 0
        wanted = int(params[at + 1 + profile])
        row = -1
        if wanted > have:
            row = flip(candidates, mask, _DECODE, _PREFILL, profile)
        elif wanted < have:
            row = flip(candidates, mask, _PREFILL, _DECODE, profile)
        if row >= 0:
            return row
    return hold(candidates, mask)


def scheduled(
    plans: Sequence[tuple[float, Sequence[int]]], profile_of: Sequence[int], prefill_tokens: int
) -> BoundPolicy:
    """The policy that follows ``plans``.

    :param plans: (time in seconds, prefill instances of each profile), ascending; the first holds from the start
    :param profile_of: profile of each instance, as the plans count them
    :param prefill_tokens: token budget of a prefill batch
    """
    left = list(plans[0][1])
    arrangement = []
    for profile in profile_of:
        role = Role.PREFILL if left[profile] > 0 else Role.DECODE
        left[profile] -= 1
        arrangement.append(InstancePlan(role=role, prefill_tokens=prefill_tokens))
    flat = [x for time, counts in plans for x in (time, *counts)]
    return BoundPolicy(
        name="scheduled",
        decide=decide,
        needs=int(Need.LOAD | Need.PREDICT),
        params=np.array([0.0, len(plans[0][1]), len(plans), *flat]),
        memory=np.zeros(1),
        arrangement=arrangement,
        values={},
    )
