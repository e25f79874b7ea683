"""Shared builders: a small training on the stub environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from dispatch_stub import StubEnv, StubNetwork

from train.config import TrainConfig
from train.ppo.learner import DispatchPPO


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    th.set_num_threads(1)


@pytest.fixture
def make_model() -> Callable[..., DispatchPPO]:
    def build(seed: int = 0, **changes: Any) -> DispatchPPO:
        settings: dict[str, Any] = {"n_envs": 16, "groups": 4, "n_steps": 32, "batch_size": 128}
        env = StubEnv(16, seed=seed)
        return DispatchPPO(env, StubNetwork, TrainConfig(**(settings | changes)), seed=seed)

    return build
