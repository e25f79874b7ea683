"""PPO's objective on a minibatch: its terms, and its gradient by autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch as th


class Batch(NamedTuple):
    """A minibatch of B frames."""

    observations: th.Tensor
    masks: th.Tensor
    actions: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor


@dataclass(frozen=True)
class Objective:
    """value_weight × value loss + [clipped policy loss − entropy_weight × entropy], the latter two if ``actor``.

    The value loss is that of (returns − ``shift``) / ``scale``.
    """

    clip: float
    entropy_weight: float
    value_weight: float
    shift: float
    scale: float
    actor: bool = True


class Losses(NamedTuple):
    """Means over a minibatch; all but ``value`` are 0 where only the value is fitted. ``kl``: k3 of Schulman 2020;
    ``clipped``: share of ratios outside the clip range."""

    value: float
    policy: float
    entropy: float
    kl: float
    clipped: float

    def total(self, goal: Objective) -> float:
        """The number whose gradient was taken."""
        return goal.value_weight * self.value + self.policy - goal.entropy_weight * self.entropy


class Actor(Protocol):
    """What the gradient is taken of: a policy that says how likely its actions were, and its optimiser."""

    optimizer: Any

    def evaluate_actions(
        self, observations: Any, actions: th.Tensor, masks: Any
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Values, log-probabilities and entropies, each (B,)."""
        ...


def differentiate(policy: Actor, batch: Batch, goal: Objective) -> Losses:
    """Gradient of ``goal`` over ``batch`` into the parameters' ``grad``."""
    policy.optimizer.zero_grad(set_to_none=True)
    values, log_prob, entropy = policy.evaluate_actions(batch.observations, batch.actions, batch.masks)
    value_loss = ((batch.returns - values) / goal.scale).square().mean()
    if not goal.actor:
        (goal.value_weight * value_loss).backward()
        return Losses(value_loss.item(), 0.0, 0.0, 0.0, 0.0)
    log_ratio = log_prob - batch.old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - goal.clip, 1 + goal.clip)
    policy_loss = -th.min(batch.advantages * ratio, batch.advantages * clipped).mean()
    loss = goal.value_weight * value_loss + policy_loss - goal.entropy_weight * entropy.mean()
    loss.backward()
    with th.no_grad():
        kl = (ratio - 1 - log_ratio).mean().item()
        outside = ((ratio - 1).abs() > goal.clip).float().mean().item()
    return Losses(value_loss.item(), policy_loss.item(), entropy.mean().item(), kl, outside)
