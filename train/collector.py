"""Environments spread over processes, seen as one: the same ``VecEnv`` contract that PPO gets in-process.

Observations, masks and the other arrays of a step live in shared memory and are written in place by the
processes; only commands and the few infos of finished episodes travel through pipes. For a given number of
processes a run is deterministic: each owns its environments and their seeds.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

__all__ = ["ATTRIBUTES", "ProcessVecEnv", "RemoteVecEnv", "own_traces"]

#: What PPO asks of an environment beside the interface of a ``VecEnv``.
ATTRIBUTES = ("n_context", "n_features", "n_candidates", "beta")


def own_traces(trace: NDArray[np.int64], worker: int) -> NDArray[np.int64]:
    """Names of arrival sequences that no other worker uses: each counts its groups from 0, with seeds of its own."""
    return trace + (worker << 40)


class _Shared:
    """The arrays of one step over all environments, in one block of shared memory.

    ``obs`` (N, D) float32, ``mask`` (N, K) bool, ``rewards`` (N,) float32, ``dones`` (N,) bool, ``elapsed_s``
    (N,) float64, ``trace`` (N,) int64, ``actions`` (N,) int64.
    """

    def __init__(self, n_envs: int, width: int, k: int, name: str | None = None) -> None:
        layout: dict[str, tuple[tuple[int, ...], type]] = {
            "elapsed_s": ((n_envs,), np.float64),
            "trace": ((n_envs,), np.int64),
            "actions": ((n_envs,), np.int64),
            "obs": ((n_envs, width), np.float32),
            "rewards": ((n_envs,), np.float32),
            "mask": ((n_envs, k), np.bool_),
            "dones": ((n_envs,), np.bool_),
        }
        size = sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in layout.values())
        self.memory = SharedMemory(name, create=name is None, size=size)
        at = 0
        for field, (shape, kind) in layout.items():
            setattr(self, field, np.ndarray(shape, kind, self.memory.buf, at))
            at += int(np.prod(shape)) * np.dtype(kind).itemsize

    obs: NDArray[np.float32]
    mask: NDArray[np.bool_]
    rewards: NDArray[np.float32]
    dones: NDArray[np.bool_]
    elapsed_s: NDArray[np.float64]
    trace: NDArray[np.int64]
    actions: NDArray[np.int64]

    def close(self, *, unlink: bool) -> None:
        for field in ("obs", "mask", "rewards", "dones", "elapsed_s", "trace", "actions"):
            delattr(self, field)  # numpy views keep the mapping busy
        self.memory.close()
        if unlink:
            self.memory.unlink()


def _serve(make: Callable[[int], VecEnv], worker: int, pipe: Connection) -> None:
    """Life of one process: build its environments, then obey until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    env: Any = make(worker)
    facts = {name: getattr(env, name) for name in ATTRIBUTES}
    pipe.send((env.num_envs, env.observation_space, env.action_space, facts))
    shared: _Shared | None = None
    try:
        name, n_envs, first = pipe.recv()
        shared = _Shared(n_envs, env.observation_space.shape[0], int(env.action_space.n), name)
        mine = slice(first, first + env.num_envs)
        while True:
            command, payload = pipe.recv()
            answer: Any = None
            if command == "step":
                shared.obs[mine], shared.rewards[mine], shared.dones[mine], infos = env.step(shared.actions[mine])
                answer = [(first + i, infos[i]) for i in np.flatnonzero(shared.dones[mine])]
                shared.elapsed_s[mine] = env.elapsed_s
            elif command == "reset":
                shared.obs[mine] = env.reset()
            elif command == "state":
                answer = env.env_state()
            elif command == "restore":
                env.set_env_state(payload)
            shared.mask[mine], shared.trace[mine] = env.action_masks(), own_traces(env.trace, worker)
            pipe.send(answer)
    except EOFError:
        pass  # the parent is gone or has closed us
    finally:
        env.close()
        if shared is not None:
            shared.close(unlink=False)


class RemoteVecEnv(VecEnv):
    """The part of SB3's contract that training does not use, for environments that live in other processes."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError("settings are fixed when the environments are built")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError("environments live in batches, not one by one")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))


class ProcessVecEnv(RemoteVecEnv):
    """Steps ``workers`` batches of environments in as many processes.

    :param make: picklable; ``make(worker)`` builds that worker's environments, seeded by its number
    :param workers: processes, 1 or more
    """

    render_mode = None

    def __init__(self, make: Callable[[int], VecEnv], workers: int) -> None:
        context = get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for worker in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(make, worker, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        facts = [pipe.recv() for pipe in self._pipes]
        counts = [entry[0] for entry in facts]
        super().__init__(sum(counts), facts[0][1], facts[0][2])
        for name, value in facts[0][3].items():
            setattr(self, name, value)
        assert self.observation_space.shape is not None
        self._shared = _Shared(self.num_envs, self.observation_space.shape[0], int(facts[0][3]["n_candidates"]))
        for pipe, first in zip(self._pipes, np.cumsum([0, *counts[:-1]]).tolist(), strict=True):
            pipe.send((self._shared.memory.name, self.num_envs, first))

    @property
    def elapsed_s(self) -> NDArray[np.float64]:
        """(N,) simulated seconds from the last decision to the present one."""
        return self._shared.elapsed_s

    @property
    def trace(self) -> NDArray[np.int64]:
        """(N,) arrival sequence of each environment."""
        return self._shared.trace

    def action_masks(self) -> NDArray[np.bool_]:
        """(N, K), a view that the next step overwrites."""
        return self._shared.mask

    def reset(self) -> NDArray[np.float32]:
        self._all("reset")
        return self._shared.obs.copy()

    def step_async(self, actions: NDArray[np.int64]) -> None:
        self._shared.actions[:] = actions
        for pipe in self._pipes:
            pipe.send(("step", None))

    def step_wait(self) -> Any:
        infos: list[dict[str, Any]] = [{}] * self.num_envs
        for pipe in self._pipes:
            for index, info in pipe.recv():
                infos[index] = info
        shared = self._shared
        return shared.obs.copy(), shared.rewards.copy(), shared.dones.copy(), infos

    def env_state(self) -> bytes:
        """States of all processes, each preceded by its length in 8 bytes."""
        return b"".join(len(state).to_bytes(8, "little") + state for state in self._all("state"))

    def set_env_state(self, state: bytes) -> None:
        """Inverse of :meth:`env_state`, for the same number of processes."""
        parts, at = [], 0
        while at < len(state):
            size = int.from_bytes(state[at : at + 8], "little")
            parts.append(state[at + 8 : at + 8 + size])
            at += 8 + size
        if len(parts) != len(self._pipes):
            raise ValueError(f"a state of {len(parts)} processes")
        self._all("restore", parts)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        if self._processes:
            self._shared.close(unlink=True)
        self._pipes, self._processes = [], []

    def _all(self, command: str, payloads: Sequence[Any] | None = None) -> list[Any]:
        """Send a command to every process, then wait for every answer."""
        for pipe, payload in zip(self._pipes, payloads or [None] * len(self._pipes), strict=True):
            pipe.send((command, payload))
        return [pipe.recv() for pipe in self._pipes]
