"""Static arrangements that several rules start from: a prefill/decode split, or every instance mixed; and the one that
suits the profile of each instance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from engine.core.kinds import Batching, Role
from engine.core.policy import InstancePlan
from engine.errors import SlalomError
from engine.latency.evaluate import decode_s, fused_shared_s, prefill_s
from policies.setting import Setting

#: Mean prompt and answer where nothing is known of the workload, tokens: those of chats.
_CHAT = (1200.0, 200.0)
_MOST_PER_S, _HALVINGS = 2.0**20, 48


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


def fitted(choices: Sequence[InstancePlan], setting: Setting) -> list[InstancePlan]:
    """For each instance the plan of ``choices`` with which its profile is predicted to serve most, the first of equals.

    :param choices: MIXED or MULTIPLEXED; those whose role the setting does not allow are left out while others remain
    """
    allowed = [plan for plan in choices if plan.role in setting.usable_roles] or list(choices)
    best: dict[tuple[int, int], InstancePlan] = {}
    found = []
    for i in range(setting.n_instances):
        kind = setting.profile_of[i], setting.max_batch[i]
        if kind not in best:
            best[kind] = max(allowed, key=lambda plan: served_per_s(plan, setting, i))
        found.append(best[kind])
    return found


def served_per_s(plan: InstancePlan, setting: Setting, i: int) -> float:
    """Requests per second that instance ``i`` is predicted to serve for ever within the tightest TPOT target, queues
    left aside, with the setting's mean prompt P and answer O.

    At λ requests per second and steps of T seconds, λ O T sequences decode, of P + O/2 tokens each.

    * MIXED: the largest λ whose fused step, with λ P T prompt tokens, takes no longer than T, where T is the TPOT
      target, or as long as the prompt tokens of a chunk budget take to arrive
    * MULTIPLEXED, T being the TPOT target: over all SM shares of decode the largest lesser of: λ whose decode step
      takes no longer than T, and 1 ÷ prefill time of P on the other SMs

    Other roles serve nobody alone: 0.
    """
    load = _Load(setting, i)
    if plan.role == Role.MIXED:
        chunk = plan.chunk_tokens or setting.chunk_tokens[i]
        return _largest(lambda rate: load.fused(rate, chunk), 1.0)
    if plan.role == Role.MULTIPLEXED:
        return max((load.shared_per_s(row) for row in range(load.whole)), default=0.0)
    return 0.0


class _Load:
    """What λ requests per second mean to instance ``i``, in steps of the tightest TPOT target."""

    def __init__(self, setting: Setting, i: int) -> None:
        row = setting.profile_of[i]
        self.profile, self.share = setting.profile[row], setting.share[row]
        self.prompt, self.answer = setting.mean_prompt or _CHAT[0], setting.mean_output or _CHAT[1]
        self.step_s = min(target.tpot_s for target in setting.classes)
        self.whole, self.seats = int(self.profile["n_shares"]) - 1, setting.max_batch[i]

    def decode_s(self, rate: float, row: int, step_s: float) -> float:
        """A decode step on share ``row`` where steps last ``step_s``; infinite where there are not seats enough."""
        n = int(rate * self.answer * step_s)
        if n > self.seats:
            return math.inf
        return float(decode_s(self.profile, self.share[row], int(n * (self.prompt + self.answer / 2)), n))

    def fused(self, rate: float, chunk: int) -> float:
        """A fused step on the whole device ÷ the time it may take."""
        step_s = min(self.step_s, chunk / (rate * self.prompt))
        tokens, full = rate * self.prompt * step_s, self.share[self.whole]
        decode = self.decode_s(rate, self.whole, step_s)
        if decode == math.inf:
            return math.inf
        prefill = float(prefill_s(self.profile, full, tokens * self.prompt, 0.0, tokens))
        return (prefill + decode - float(fused_shared_s(full, prefill, decode))) / step_s

    def shared_per_s(self, row: int) -> float:
        """Requests per second with decode on share ``row`` and prefill on the other SMs."""
        rest = self.profile["total_sms"] - self.share[row]["sms"]
        others = [k for k in range(self.whole) if self.share[k]["sms"] <= rest]
        if not others:
            return 0.0
        part, beside = self.share[others[-1]], float(self.share[row]["corun_decode"])
        prefill = float(prefill_s(self.profile, part, self.prompt**2, 0.0, self.prompt)) * float(part["corun_prefill"])
        return min(1.0 / prefill, _largest(lambda rate: self.decode_s(rate, row, self.step_s) * beside, self.step_s))


def _largest(seconds: Callable[[float], float], limit: float) -> float:
    """The largest rate at which ``seconds``, which grows with it, is at most ``limit``; 0 where none is.

    A formula without noise that costs nothing to ask: plain bisection. Measured shares, which need not fall, are
    searched by ``env.measure.goodput``.
    """
    low, high = 1.0 / _MOST_PER_S, _MOST_PER_S
    if seconds(low) > limit:
        return 0.0
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if seconds(middle) <= limit else (low, middle)
    return low
