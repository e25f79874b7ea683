"""Run by test_state in a process of its own: trains on the stub and writes its state after every update."""

from __future__ import annotations

import sys
from pathlib import Path

import torch as th
from dispatch_stub import StubEnv, StubNetwork

from train.config import TrainConfig
from train.ppo.callbacks import StateCallback
from train.ppo.learner import DispatchPPO

if __name__ == "__main__":
    th.set_num_threads(1)
    env = StubEnv(16, seed=4)
    config = TrainConfig(n_envs=16, groups=4, n_steps=32, batch_size=128)
    model = DispatchPPO(env, StubNetwork, config, seed=4)
    state = StateCallback(Path(sys.argv[1]), 0.0, lambda: {"frames": model.num_timesteps})
    model.learn(10**8, state)
