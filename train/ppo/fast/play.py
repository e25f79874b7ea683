"""Rollouts of simulated clusters in this process, without a step in Python: one compiled call plays one cluster."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray

from engine.jit.rows import addresses
from env.gym.vector_env import SlalomVecEnv
from env.surrogate.batch import ASKED, Clusters
from train.ppo.buffer import SMDPRolloutBuffer
from train.ppo.fast.act import Tape, play
from train.ppo.fast.pack import Observed
from train.ppo.policy import ScoringPolicy

__all__ = ["Player"]


class Player:
    """Fills a rollout buffer from ``env`` by the fused network of ``policy``.

    :param buffer: with its ``packed`` decisions
    """

    def __init__(self, env: SlalomVecEnv, policy: ScoringPolicy, buffer: SMDPRolloutBuffer) -> None:
        self.env, self.policy, self.buffer = env, policy, buffer
        clusters = env.clusters()
        self._observed = Observed.of(clusters.observation, clusters.mask)  # in place: the environment keeps its arrays
        self._rehearse()

    def _rehearse(self) -> None:
        """Compile the kernel (or load it) before a clock runs."""
        now_s, began = np.zeros(self.env.num_envs), np.zeros(self.env.num_envs, bool)
        clusters, uniform = self.env.clusters(), np.zeros((0, self.env.num_envs), np.float32)
        self._play(0, 0, 0, uniform, clusters, self._words(self._tape(now_s, began)))

    def _words(self, tape: Tape) -> tuple[NDArray[np.int64], ...]:
        """The address vectors that a kernel takes for one rollout; ``tape`` must outlive them."""
        fused, packed = self.policy.fused, self.buffer.packed
        assert fused is not None
        assert packed is not None
        return addresses(self._observed), addresses(tape), *packed.words, *fused.words

    def _play(
        self,
        b: int,
        begin: int,
        end: int,
        uniform: NDArray[np.float32],
        clusters: Clusters,
        words: tuple[NDArray[np.int64], ...],
    ) -> int:
        """Decisions ``begin`` to ``end`` of cluster ``b``, or fewer: up to where its episode ends."""
        unit, seen = self.policy.unit, self.policy.seen.numpy()
        return int(play(b, begin, end, uniform, clusters, *self.env.rule, *words, *unit, addresses([seen])))

    def rollout(self, now_s: NDArray[np.float64], began: NDArray[np.bool_]) -> list[dict[str, Any]]:
        """Take ``buffer_size`` decisions in every cluster.

        :param now_s: (N,) simulated time since each episode began, ``began`` (N,) whether the decision that waits is
            the first of one; both are kept up to date
        :return: infos of the episodes that ended
        """
        buffer, clusters = self.buffer, self.env.clusters()
        n_steps, infos = buffer.buffer_size, []
        uniform = th.rand(n_steps, buffer.n_envs, generator=self.policy.generator).numpy()
        tape = self._tape(now_s, began)
        words = self._words(tape)
        for b in range(buffer.n_envs):
            step = 0
            while step < n_steps:
                step = self._play(b, step, n_steps, uniform, clusters, words)
                if clusters.status[b] != ASKED:
                    infos.append(self._end(b, step - 1, tape))
        assert buffer.packed is not None
        buffer.packed.complete = True
        return infos

    def _tape(self, now_s: NDArray[np.float64], began: NDArray[np.bool_]) -> Tape:
        names = [name for name in Tape._fields if name not in ("now_s", "began", "now_trace")]
        columns = {name: getattr(self.buffer, name) for name in names}
        for name in ("observations", "action_masks"):
            columns[name] = self.buffer.flat(name).numpy()
        return Tape(**columns, now_s=now_s, began=began, now_trace=self.env.trace)

    def _end(self, b: int, step: int, tape: Tape) -> dict[str, Any]:
        """Cluster ``b`` was cut after ``step``: bring it to its next episode."""
        info = self.env.end_episode(b)
        self.buffer.bootstrap(step, {b: info}, self.policy.predict_values)
        tape.now_s[b], tape.began[b] = 0.0, True
        return info
