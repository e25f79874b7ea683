"""Rollouts from Ray actors: the same as without Ray, reproducible, and not lost with a worker."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from dispatch_stub import StubEnv, StubNetwork
from stable_baselines3.common.callbacks import BaseCallback

from engine.errors import SlalomError
from env.measure import pool as ray_pool
from train.collect.learner import RemotePPO
from train.collect.workers import RayCollector, RolloutWorker
from train.config import TrainConfig, load_config

CONFIG: TrainConfig = load_config(None, "", n_envs=16, groups=4, n_steps=32, batch_size=128)
HALF = CONFIG.model_copy(update={"n_envs": 8})


def make(worker: int, n_envs: int = 8) -> StubEnv:
    return StubEnv(n_envs, seed=100 + worker)


def weights(model: Any) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in model.policy.state_dict().items()}


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SlalomError, match=r"slalom\[ray\]"):
        ray_pool.connect("auto")


def test_sources_of_another_version_are_refused() -> None:
    with pytest.raises(SlalomError, match="same version"):
        ray_pool.check_code("0" * 64)


def test_a_rollout_follows_from_seed_worker_and_number_alone() -> None:
    def rollout(seed: int, number: int, before: int = 0) -> Any:
        worker = RolloutWorker(make, StubNetwork, HALF, seed, 0)
        given = {name: np.array(value) for name, value in weights(worker._model).items()}
        for earlier in range(before):
            worker.collect(given, earlier)
        worker.restore(make(0).env_state())
        return worker.collect(given, number).columns

    first = rollout(1, 5)
    assert first["observations"].shape == (32, 8, 19)
    for again in (rollout(1, 5), rollout(1, 5, before=2)):
        for name, column in first.items():
            np.testing.assert_array_equal(column, again[name], err_msg=name)
    assert (first["actions"] != rollout(1, 6)["actions"]).any()
    assert (first["actions"] != rollout(2, 5)["actions"]).any()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    here = [str(Path(__file__).parent), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(here))  # workers import the stub from here
        patch.setenv("RAY_ADDRESS", "")
        ray_pool.connect("auto", cores=2)
        yield ray
        ray.shutdown()


class Watch(BaseCallback):
    """Keeps the weights after four rollouts, then kills worker 0 while it collects the next."""

    def __init__(self, kill: bool) -> None:
        super().__init__()
        self.kill, self.kept = kill, np.zeros(0)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        env: Any = self.model.env
        if self.model.num_timesteps == 512 * 4:
            self.kept = th.cat([p.detach().ravel() for p in self.model.policy.parameters()]).numpy().copy()
            if self.kill:
                env._ray.kill(env._actors[0], no_restart=True)


class NoRay:
    """The few calls of Ray that a collector makes, answered in this process and at once."""

    class exceptions:
        RayTaskError = RayActorError = ObjectLostError = ZeroDivisionError

    def remote(self, **_: Any) -> Any:
        return lambda built: SimpleNamespace(remote=lambda *given: _Called(built(*given)))

    def put(self, value: Any) -> Any:
        return value

    def get(self, values: list[Any]) -> list[Any]:
        return values

    def wait(self, values: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return values[-num_returns:], values[:-num_returns]

    def kill(self, actor: Any) -> None: ...


class _Called:
    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def __getattr__(self, name: str) -> Any:
        method = SimpleNamespace(remote=getattr(self._worker, name))
        method.options = lambda **_: method
        return method


def train(kill: bool, rollouts: int) -> tuple[np.ndarray, int, RemotePPO]:
    env = RayCollector(make, StubNetwork, HALF, 2, seed=3)
    watch = Watch(kill)
    try:
        model = RemotePPO(env, StubNetwork, CONFIG, seed=3)
        model.learn(512 * rollouts, watch)
        return watch.kept, env.replaced, model
    finally:
        env.close()


@pytest.mark.slow
def test_training_on_actors_equals_one_without_ray_and_survives_the_death_of_one(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One training for all three, since starting actors is what takes the time."""
    kept, replaced, model = train(kill=True, rollouts=6)
    assert replaced == 1
    assert model.num_timesteps == 512 * 6
    assert {int(trace) >> 40 for trace in model.rollout_buffer.trace.ravel()} == {0, 1}  # no sequence is shared
    assert all(th.isfinite(p).all() for p in model.policy.parameters())
    monkeypatch.setitem(sys.modules, "ray", NoRay())
    alone, replaced, _ = train(kill=False, rollouts=6)
    assert replaced == 0
    np.testing.assert_array_equal(kept, alone)


@pytest.mark.slow
def test_jobs_on_the_cluster_answer_in_any_order_and_raise_what_they_raised(cluster: Any) -> None:
    with ray_pool.RayExecutor() as pool:
        futures = [pool.submit(partial(int, base=7), text) for text in ("10", "6", "100")]
        assert [future.result(180) for future in futures] == [7, 6, 49]
        with pytest.raises(SlalomError, match="RATE"):
            pool.submit(_refuse, 1).result(180)


def _refuse(value: int) -> None:
    raise SlalomError("RATE", value, "another one")
