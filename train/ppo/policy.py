"""The scoring network seen as a stable-baselines3 policy: flat observation in, masked choice out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from numpy.typing import NDArray
from sb3_contrib.common.maskable.distributions import MaskableDistribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import nn


class ScoringPolicy(MaskableActorCriticPolicy):
    """Actor and critic around a network that scores candidates.

    The observation is ``[context (C) | candidates (K x F) | advice (K), where given]`` in float32, the action an
    index below K.

    :param make_network: builds a module called as ``network(observations, mask (B, K))`` whose answer has
        ``logits`` (B, K), masked rows far below the others, and ``value`` (B,) on a unit scale;
        :class:`policies.network.scoring.ScoringNetwork` is one
    :param n_context: C
    :param n_features: F
    :param seed: of the exploration noise and minibatch order, kept apart from torch's global generator so
        that nothing outside (an evaluation, a callback) can change a training
    """

    value_shift: th.Tensor
    value_scale: th.Tensor
    seen: th.Tensor  # least and greatest observation column so far: (2, C + F)

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        *,
        make_network: Callable[[], nn.Module],
        n_context: int,
        n_features: int,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        # before the parent's constructor, which calls _build
        self._make_network = make_network
        self.n_context, self.n_features = n_context, n_features
        self.n_candidates = int(action_space.n)
        self.generator = th.Generator().manual_seed(seed)
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        """Network and optimiser; parameters that do not require gradients (the base rule) stay out of it."""
        self.network = self._make_network()
        self.register_buffer("value_shift", th.zeros(()))
        self.register_buffer("value_scale", th.ones(()))
        columns = self.n_context + self.n_features
        self.register_buffer("seen", th.tensor([float("inf"), -float("inf")]).repeat_interleave(columns).view(2, -1))
        self.trainable = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = th.optim.Adam(self.trainable, lr=lr_schedule(1.0), eps=1e-5, fused=True)

    def set_value_scale(self, shift: float, scale: float) -> None:
        """Values become ``shift + scale x network output``."""
        self.value_shift.fill_(shift)
        self.value_scale.fill_(scale)

    def note_seen(self, observations: NDArray[np.float32]) -> None:
        """Widen the bounds of what the policy was trained on by observations (B, C + K·F [+ K]).

        Rows of zeros are padding.
        """
        rows, seen, context = self._rows(th.from_numpy(observations)).numpy(), self.seen.numpy(), self.n_context
        for at, found in ((slice(context), observations[:, :context]), (slice(context, None), rows[rows.any(-1)])):
            np.minimum(seen[0, at], found.min(0), out=seen[0, at])
            np.maximum(seen[1, at], found.max(0), out=seen[1, at])

    def _scores(self, obs: th.Tensor, mask: th.Tensor | None) -> tuple[th.Tensor, th.Tensor]:
        """Logits (B, K) and values (B,). Without a mask, rows of all zeros count as padding."""
        if mask is None:
            mask = (self._rows(obs) != 0).any(-1)
        scores = self.network(obs, th.as_tensor(mask, dtype=th.bool))
        return scores.logits, self.value_shift + self.value_scale * scores.value

    def _rows(self, obs: th.Tensor) -> th.Tensor:
        """The candidates (B, K, F) of observations."""
        end = self.n_context + self.n_candidates * self.n_features
        return obs[:, self.n_context : end].reshape(-1, self.n_candidates, self.n_features)

    def forward(  # type: ignore[override]
        self, obs: th.Tensor, deterministic: bool = False, action_masks: th.Tensor | None = None
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Action, value and log-probability, each (B,). Samples by the Gumbel-max trick."""
        logits, values = self._scores(obs, action_masks)
        if deterministic:
            actions = logits.argmax(-1)
        else:
            noise = th.empty_like(logits).exponential_(generator=self.generator).log_()
            actions = (logits - noise).argmax(-1)
        log_prob = logits.log_softmax(-1).gather(1, actions.unsqueeze(1)).squeeze(1)
        return actions, values, log_prob

    def evaluate_actions(
        self, obs: th.Tensor, actions: th.Tensor, action_masks: th.Tensor | None = None
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Value, log-probability of ``actions`` and entropy in nats, each (B,)."""
        logits, values = self._scores(obs, action_masks)
        log_all = logits.log_softmax(-1)
        entropy = -(log_all.exp() * log_all).sum(-1)
        return values, log_all.gather(1, actions.unsqueeze(1)).squeeze(1), entropy

    def get_distribution(  # type: ignore[override]
        self, obs: th.Tensor, action_masks: th.Tensor | None = None
    ) -> MaskableDistribution:
        """The masked categorical distribution, for callers that want the object."""
        logits, _ = self._scores(obs, action_masks)
        return self.action_dist.proba_distribution(action_logits=logits)

    def predict_values(self, obs: th.Tensor, action_masks: th.Tensor | None = None) -> th.Tensor:  # type: ignore[override]
        """Value (B,)."""
        return self._scores(obs, action_masks)[1]

    def _predict(  # type: ignore[override]
        self, observation: th.Tensor, deterministic: bool = False, action_masks: th.Tensor | None = None
    ) -> th.Tensor:
        return self.forward(observation, deterministic, action_masks)[0]
