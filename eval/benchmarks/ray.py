"""Rollout rate of two Ray nodes against one of them: separate processes on this machine, one core each.

Every node brings one worker with 64 environments of the reference workload on 8 instances; what is timed is
collecting whole rollouts as training does it, weights out and columns back. One node and two take turns.
"""

from __future__ import annotations

import logging
import os
import time
from functools import partial
from typing import Any

import numpy as np

from eval.benchmarks import training

ROUNDS = 5
ROLLOUTS = 4  # of each round


def run() -> dict[str, Any]:
    """Frames per second of one node and of two, and their ratio, paired by round."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)  # an actor claims one core, so each node gets one
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        return _measure()
    finally:
        ray.shutdown()
        cluster.shutdown()


def _measure() -> dict[str, Any]:
    from train.collect.workers import RayCollector, RolloutWorker
    from train.config import load_config

    config = load_config(None, "", workers=1)
    build = partial(_worker_environments, n_envs=config.n_envs)
    weights = {
        name: value.numpy().copy()
        for name, value in RolloutWorker(build, training._network, config, 0, 0)._model.policy.state_dict().items()
    }
    one, two = (RayCollector(build, training._network, config, n) for n in (1, 1))
    frames = config.n_envs * config.n_steps

    def rate(collectors: list[Any]) -> float:
        begin = time.perf_counter()
        for number in range(ROLLOUTS):
            for collector in collectors:
                collector.begin(weights, number)
            for collector in collectors:
                collector.take()
        return ROLLOUTS * len(collectors) * frames / (time.perf_counter() - begin)

    try:
        rate([one, two])
        rates = np.array([[rate([one]), rate([one, two])] for _ in range(ROUNDS)])
    finally:
        one.close()
        two.close()
    ratios = rates[:, 1] / rates[:, 0]
    return {
        "frames_per_second_one_node": float(np.median(rates[:, 0])),
        "frames_per_second_two_nodes": float(np.median(rates[:, 1])),
        "ratio": float(np.median(ratios)),
        "ratio_range": [float(ratios.min()), float(ratios.max())],
        "environments_per_node": config.n_envs,
        "frames_per_rollout": frames,
        "rounds": ROUNDS,
    }


def _worker_environments(worker: int, n_envs: int) -> Any:
    return training._environment(n_envs)
