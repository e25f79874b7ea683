"""What of the simulator takes long to compile, see ``engine.jit.warm``: large parts, then the loops made of them."""

from __future__ import annotations

from env.surrogate.parts import PARTS


def simulator() -> None:
    from env.scenario import Scenario
    from env.surrogate.simulate import simulate

    simulate(Scenario.load("tiny-4xa100"), "least_tokens", rate=10.0, n_requests=20)


def environment() -> None:
    from env.gym.vector_env import SlalomVecEnv
    from env.scenario import Scenario

    SlalomVecEnv(Scenario.load("tiny-4xa100"), 1).close()


STAGES = (PARTS, (simulator, environment))
