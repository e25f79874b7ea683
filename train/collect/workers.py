"""Rollouts collected by Ray actors, each with environments and a copy of the policy of its own.

An actor gets the weights and the number of the rollout, plays ``n_steps`` decisions in its environments and sends
its columns of the buffer back: two messages a rollout, none a step. Its random numbers follow from (seed, worker,
rollout), so for a given number of workers a training is reproducible wherever the actors run. An actor that dies is
replaced; its environments go on with their next episodes, and what it was collecting is collected again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch as th
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from engine.errors import SlalomError
from env.gym.base import SharedVecEnv
from env.measure.digest import code_sha256
from env.measure.pool import check_code
from train.collect.pieces import cut, join, pieces_for
from train.config import TrainConfig
from train.ppo.learner import DispatchPPO

Weights = dict[str, NDArray[Any]]
_MOST_DEATHS = 5  # of one worker during one rollout

#: What PPO asks of an environment beside the interface of a ``VecEnv``.
ATTRIBUTES = ("n_context", "n_features", "n_candidates", "beta")


def own_traces(trace: NDArray[np.int64], worker: int) -> NDArray[np.int64]:
    """Names of arrival sequences that no other worker uses: each counts its groups from 0, with seeds of its own."""
    return trace + (worker << 40)


class Rollout(NamedTuple):
    """What one worker collected with its n environments in T steps.

    :param columns: arrays (T, n) or (T, n, width) by their names in the rollout buffer
    :param values: (n,) values after the last step
    :param observations: (n, D), ``starts`` (n,), ``clock_s`` (n,): where its environments are now
    :param infos: of the episodes that ended
    :param state: of its environments, see ``VecEnv.env_state``
    :param seconds: how long it took
    """

    columns: dict[str, NDArray[Any]]
    values: NDArray[np.float32]
    observations: NDArray[np.float32]
    starts: NDArray[np.bool_]
    clock_s: NDArray[np.float64]
    infos: list[dict[str, Any]]
    state: bytes
    seconds: float


class RolloutWorker:
    """The life of one actor; a plain class, so that it also runs without Ray.

    :param make: ``make(worker)`` builds its environments
    :param state: of its environments, if they are to go on with the episodes after those
    """

    def __init__(
        self,
        make: Callable[[int], VecEnv],
        make_network: Callable[[], nn.Module],
        config: TrainConfig,
        seed: int,
        worker: int,
        state: bytes | None = None,
        digest: str | None = None,
    ) -> None:
        if digest is not None:
            check_code(digest)
        th.set_num_threads(1)
        env: Any = make(worker)
        self._env = env
        if state is not None:
            self._env.set_env_state(state)
        self._seeds = (seed, worker)
        self._model: Any = DispatchPPO(self._env, make_network, config)
        self._restart()

    def facts(self) -> tuple[int, Any, Any, dict[str, Any], NDArray[np.float32]]:
        """Number of environments, both spaces, what PPO asks of an environment, and the first observations."""
        env = self._env
        described = {name: getattr(env, name) for name in ATTRIBUTES}
        return env.num_envs, env.observation_space, env.action_space, described, self._model._last_obs

    def restore(self, state: bytes) -> Any:
        """Go on with the episodes after those of ``state``; their first observations."""
        self._env.set_env_state(state)
        return self._restart()

    def _restart(self) -> Any:
        model = self._model
        model._last_obs = self._env.reset()
        model._last_episode_starts = np.ones(self._env.num_envs, bool)
        model.clock_s = np.zeros(self._env.num_envs)
        return model._last_obs

    def send(self, number: int, pieces: int, *weights: bytes) -> list[bytes]:
        """:meth:`collect` as so many pieces, given the pieces of the weights (see :mod:`train.collect.pieces`)."""
        return cut(self.collect(join(weights), number), pieces)

    def collect(self, weights: Weights, number: int) -> Rollout:
        """Rollout ``number`` with the policy given by ``weights`` (its ``state_dict`` as arrays)."""
        model, buffer = self._model, self._model.rollout_buffer
        policy = model.policy
        policy.load_state_dict({name: th.from_numpy(np.array(value)) for name, value in weights.items()})
        policy.generator.manual_seed(int(np.random.SeedSequence([*self._seeds, number]).generate_state(1)[0]))
        policy.set_training_mode(False)
        buffer.reset()
        model.split.seconds.clear()
        model.ep_info_buffer, model.ep_success_buffer = deque(), deque()  # the learner keeps the statistics
        infos: list[dict[str, Any]] = []
        with th.inference_mode():
            for step in range(buffer.buffer_size):
                model._step(self._env, buffer, step)
                infos += [model._infos[i] for i in np.flatnonzero(model._last_episode_starts)]
            buffer.trace[:] = own_traces(buffer.trace, self._seeds[1])
            masks = self._env.action_masks()
            last = policy.predict_values(th.from_numpy(model._last_obs), masks)
        return Rollout(
            _columns(buffer),
            last.numpy(),
            model._last_obs,
            model._last_episode_starts,
            model.clock_s.copy(),
            [_told(info) for info in infos],
            self._env.env_state(),
            sum(model.split.seconds.values()),
        )


def _told(info: dict[str, Any]) -> dict[str, Any]:
    return {name: info[name] for name in ("episode", "attainment") if name in info}


def _columns(buffer: Any) -> dict[str, NDArray[Any]]:
    """Every array of the buffer that a collector fills; the learner computes the other two."""
    shape = (buffer.buffer_size, buffer.n_envs)
    arrays = {name: value for name, value in vars(buffer).items() if isinstance(value, np.ndarray)}
    skip = ("advantages", "returns")
    return {name: value for name, value in arrays.items() if value.shape[:2] == shape and name not in skip}


class RayCollector(SharedVecEnv):
    """``workers`` actors as seen by the learner: whole rollouts through :meth:`begin` and :meth:`take`.

    It has the shape of a ``VecEnv`` because SB3 asks for one; single steps are not offered.

    :param make: picklable; ``make(worker)`` builds that worker's environments, seeded by its number
    :param config: with the number of steps of a rollout
    :param options: of every actor, as ``ray.remote`` takes them
    """

    render_mode = None

    def __init__(
        self,
        make: Callable[[int], VecEnv],
        make_network: Callable[[], nn.Module],
        config: TrainConfig,
        workers: int,
        *,
        seed: int = 0,
        **options: Any,
    ) -> None:
        import ray

        self._ray = ray
        self._build = (make, make_network, config, seed)
        self._resources: dict[str, Any] = {"num_cpus": 1} | options
        self._states: list[bytes | None] = [None] * workers
        self._actors = [self._actor(worker) for worker in range(workers)]
        self._pending: list[list[Any]] | None = None
        self._number = 0
        self._weights: list[bytes] = []
        self._pieces = 2  # that a rollout is sent in
        self.replaced = 0
        facts = self._get([actor.facts.remote() for actor in self._actors])
        self._counts = [entry[0] for entry in facts]
        super().__init__(sum(self._counts), facts[0][1], facts[0][2])
        for name, value in facts[0][3].items():
            setattr(self, name, value)
        self._observations = np.concatenate([entry[4] for entry in facts])

    def _actor(self, worker: int, **options: Any) -> Any:
        remote: Any = self._ray.remote(**(self._resources | options))(RolloutWorker)
        return remote.remote(*self._build, worker, self._states[worker], code_sha256())

    def _get(self, references: list[Any]) -> list[Any]:
        """Results; an error of the worker's own comes out as it was raised there."""
        try:
            return list(self._ray.get(references))
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, SlalomError) else error) from None

    # -- rollouts

    def begin(self, weights: Weights, number: int) -> None:
        """Have every worker collect rollout ``number``; returns at once."""
        self._number, self._weights = number, cut(weights)
        self._pending = [self._ask(actor) for actor in self._actors]

    def _ask(self, actor: Any) -> list[Any]:
        """Have one worker collect; references to the pieces of its rollout."""
        ask = actor.send.options(num_returns=self._pieces)
        pieces: list[Any] = ask.remote(self._number, self._pieces, *self._weights)
        return pieces

    @property
    def busy(self) -> bool:
        """Whether a rollout has begun that nobody has taken yet."""
        return self._pending is not None

    def take(self) -> list[Rollout]:
        """Wait for the rollout that was begun: one part per worker, in the order of their numbers."""
        assert self._pending is not None
        waiting = {pieces[0]: worker for worker, pieces in enumerate(self._pending)}
        arrived: dict[int, Rollout] = {}
        largest = 0
        while waiting:  # what has come is unpacked while others still collect
            first = self._ray.wait(list(waiting), num_returns=1)[0][0]
            worker = waiting.pop(first)
            pieces = self._received(worker, self._pending[worker])
            largest = max(largest, sum(map(len, pieces)))
            arrived[worker] = join(pieces)
        self._pending = None
        self._pieces = pieces_for(largest + largest // 16)  # the next may be a little larger
        parts = [arrived[worker] for worker in range(len(self._actors))]
        self._states = [part.state for part in parts]
        return parts

    def _received(self, worker: int, pieces: list[Any]) -> list[bytes]:
        died = (self._ray.exceptions.RayActorError, self._ray.exceptions.ObjectLostError)
        for _ in range(_MOST_DEATHS):
            try:
                return self._get(pieces)
            except died:
                # without a claim on a core: the node that had one free may be gone
                self._actors[worker] = self._actor(worker, num_cpus=0)
                self.replaced += 1
                pieces = self._ask(self._actors[worker])
        fix = "look into the logs of Ray (/tmp/ray); it may be short of memory"
        raise SlalomError("--ray", f"worker {worker}", f"it died {_MOST_DEATHS} times in one rollout; {fix}")

    # -- what PPO and its checkpoints ask of an environment

    def reset(self) -> NDArray[np.float32]:
        return self._observations

    def env_state(self) -> bytes:
        """States of all workers after the last rollout taken, each preceded by its length in 8 bytes."""
        states = [state or b"" for state in self._states]
        return b"".join(len(state).to_bytes(8, "little") + state for state in states)

    def set_env_state(self, state: bytes) -> None:
        """Inverse of :meth:`env_state`, for the same number of workers."""
        parts, at = [], 0
        while at < len(state):
            size = int.from_bytes(state[at : at + 8], "little")
            parts.append(state[at + 8 : at + 8 + size])
            at += 8 + size
        if len(parts) != len(self._actors):
            raise ValueError(f"a state of {len(parts)} workers")
        self._states = [part or None for part in parts]
        told = [(actor, part) for actor, part in zip(self._actors, parts, strict=True) if part]
        if told:
            self._observations = np.concatenate(self._get([actor.restore.remote(part) for actor, part in told]))

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []

    def step_async(self, actions: NDArray[np.int64]) -> None:
        raise NotImplementedError("rollouts are collected whole")

    def step_wait(self) -> Any:
        raise NotImplementedError("rollouts are collected whole")
