"""What of learning takes long to compile, see ``engine.jit.warm``; after the parts shared with the simulator."""

from __future__ import annotations

from typing import Any

from engine.jit.warm import Step

__all__ = ["STAGES"]


def learner() -> None:
    from env.gym.vector_env import SlalomVecEnv
    from env.scenario import Scenario
    from policies.network.scoring import ScoringNetwork
    from policies.rules import linear_score
    from train.config import TrainConfig
    from train.ppo.learner import DispatchPPO

    env = SlalomVecEnv(Scenario.load("tiny-4xa100"), 2, advise=True)
    weights = linear_score.weights(linear_score.RULE.values())
    small: dict[str, Any] = {"n_envs": 2, "groups": 1, "n_steps": 16, "batch_size": 16}
    DispatchPPO(env, lambda: ScoringNetwork(weights, 16), TrainConfig(**small))


STAGES: tuple[tuple[Step, ...], ...] = ((), (learner,))
