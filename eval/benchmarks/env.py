"""Speed of the batched environment as a learner sees it: observations and masks handed to Python."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from eval.benchmarks.reference import RATE, reference_scenario

N_ENVS = 64
STEPS = 500
REPEATS = 5


def run() -> dict[str, Any]:
    """Decisions per second over all environments, random allowed actions: median after a warm-up."""
    from env.gym.vector_env import SlalomVecEnv

    env = SlalomVecEnv(reference_scenario(), N_ENVS, rates=(0.8 * RATE, 1.2 * RATE), seed=0)
    rng = np.random.default_rng(0)
    try:
        env.reset()
        _steps(env, rng, STEPS)
        seconds = [_steps(env, rng, STEPS) for _ in range(REPEATS)]
    finally:
        env.close()
    return {
        "decisions_per_second": N_ENVS * STEPS / float(np.median(seconds)),
        "environments": N_ENVS,
        "steps": STEPS,
        "repeats": REPEATS,
    }


def _steps(env: Any, rng: np.random.Generator, steps: int) -> float:
    """Seconds inside the environment; drawing the actions is not counted."""
    spent = 0.0
    for _ in range(steps):
        masks = env.action_masks()
        actions = np.where(masks, rng.random(masks.shape), -1.0).argmax(axis=1)
        started = time.perf_counter()
        env.step(actions)
        spent += time.perf_counter() - started
    return spent
