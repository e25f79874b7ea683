"""Speed of learning on one core, interleaved with stable-baselines3-contrib's MaskablePPO at its default schedule.

Both learn on the same environment (the reference workload on 8 instances) with the same scoring network, one
thread each, in turns, so that what the machine does otherwise falls on both. The stock side is a plain subclass of
``MaskableActorCriticPolicy`` around the network and MaskablePPO's own defaults: minibatches of 64, 10 epochs,
2,048 x 8 frames a rollout (here 64 environments x 256 steps, which favours it: its forward passes are larger).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from eval.benchmarks.reference import RATE, reference_scenario

INSTANCES = 8
ROUNDS = 5
OUR_UPDATES = 3  # of each round
_STOCK_ENVS, _STOCK_STEPS = 64, 256


def run() -> dict[str, Any]:
    """Frames per second of one core, median over rounds, and the ratio to stock, paired by round."""
    import torch as th

    th.set_num_threads(1)
    ours, ours_timed = _ours()
    stock_timed = _stock()
    ours_timed(), stock_timed(warm_up=True)  # compilation, caches, allocator
    ours.split.seconds.clear()
    rounds = [(ours_timed(), stock_timed()) for _ in range(ROUNDS)]
    rates = np.array([[frames / wall for frames, wall, _ in pair] for pair in rounds])
    per_cpu = np.array([[frames / cpu for frames, _, cpu in pair] for pair in rounds])
    ratios = rates[:, 0] / rates[:, 1]
    flops = flops_per_frame(ours.policy.network, ours.env.n_candidates, ours.n_epochs)
    gemm = _gemm_flops()
    split = {name: round(share, 3) for name, share in ours.split.shares().items()}
    fastest = float(np.median(rates[:, 0]))
    return {
        "frames_per_second_per_core": fastest,
        "ratio_to_stock": float(np.median(ratios)),
        "ratio_range": [float(ratios.min()), float(ratios.max())],
        "frames_per_cpu_second": float(np.median(per_cpu[:, 0])),
        "stock_frames_per_second": float(np.median(rates[:, 1])),
        "stock_frames_per_cpu_second": float(np.median(per_cpu[:, 1])),
        "instances": INSTANCES,
        "environments": ours.n_envs,
        "time_split": split,
        "flops_per_frame": flops,
        "gemm_gflops": gemm / 1e9,
        "arithmetic_ceiling_frames_per_second": gemm / flops,
        "limit": _sentence(fastest, gemm, flops, split),
        "rounds": ROUNDS,
    }


def flops_per_frame(network: Any, rows: int, epochs: int) -> float:
    """Floating-point operations of the network's matrix products for one frame learned from.

    A forward pass while collecting, then a forward and a backward pass (twice a forward) in each epoch. Layers that
    see every candidate count ``rows`` times, the others once.
    """
    per_row = ("candidate", "head", "out")
    forward = 0.0
    for name, parameter in network.named_parameters():
        if parameter.ndim == 2 and parameter.requires_grad:
            forward += 2.0 * parameter.numel() * (rows if name.split(".")[0] in per_row else 1)
    return forward * (1 + 3 * epochs)


def _sentence(rate: float, gemm: float, flops: float, split: dict[str, float]) -> str:
    largest = max(split, key=lambda name: split[name])
    return (
        f"One frame needs {flops / 1e3:.0f} kFLOP of matrix products, so this core's {gemm / 1e9:.0f} GFLOP/s would "
        f"allow {gemm / flops / 1e3:.0f} k frames/s; {100 * rate * flops / gemm:.0f} % of that is reached, and "
        f"{largest} takes the most time ({100 * split[largest]:.0f} %)."
    )


def _gemm_flops() -> float:
    """Best float32 matrix product of this core, operations per second."""
    import torch as th

    n, best = 1024, float("inf")
    a = th.randn(n, n)
    for _ in range(12):
        begin = time.perf_counter()
        th.mm(a, a)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * n**3 / best


def _environment(n_envs: int) -> Any:
    from env.gym.vector_env import SlalomVecEnv

    scenario = reference_scenario().with_overrides({"cluster.0.count": INSTANCES, "rates.high": 400.0})
    rate = RATE * INSTANCES / 4
    return SlalomVecEnv(scenario, n_envs, rates=(0.8 * rate, 1.2 * rate), n_requests=3000, seed=0, groups=8)


def _network() -> Any:
    from policies.network.scoring import ScoringNetwork
    from policies.rules import linear_score
    from train.config import load_config

    config = load_config(None, "")
    return ScoringNetwork(linear_score.weights(linear_score.RULE.values()), config.hidden, config.base_scale)


Timed = tuple[int, float, float]  # frames, wall seconds, CPU seconds


def _timed(model: Any, frames: int) -> Timed:
    before, wall, cpu = model.num_timesteps, time.perf_counter(), time.process_time()
    model.learn(frames, reset_num_timesteps=False)
    return model.num_timesteps - before, time.perf_counter() - wall, time.process_time() - cpu


def _ours() -> tuple[Any, Callable[[], Timed]]:
    from train.config import load_config
    from train.ppo.learner import DispatchPPO

    config = load_config(None, "", target_kl=None)  # every epoch is run to its end
    model = DispatchPPO(_environment(config.n_envs), _network, config)
    return model, lambda: _timed(model, OUR_UPDATES * config.n_envs * config.n_steps)


def _stock() -> Callable[..., Timed]:
    from sb3_contrib import MaskablePPO

    defaults = MaskablePPO(_stock_policy(), _environment(_STOCK_ENVS), n_steps=_STOCK_STEPS, device="cpu", seed=0)
    assert (defaults.batch_size, defaults.n_epochs) == (64, 10), "MaskablePPO's defaults have changed"

    def timed(warm_up: bool = False) -> Timed:
        """A rollout and its update; ``warm_up`` skips most of the epochs."""
        defaults.n_epochs = 1 if warm_up else 10
        return _timed(defaults, _STOCK_ENVS * _STOCK_STEPS)

    return timed


def _stock_policy() -> Any:
    """The shortest way to put a scoring network into sb3-contrib: its own distribution and masking."""
    import torch as th
    from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy

    class StockPolicy(MaskableActorCriticPolicy):
        def _build(self, lr_schedule: Any) -> None:
            self.network, self._rows = _network(), int(self.action_space.n)  # type: ignore[attr-defined]
            build: Any = self.optimizer_class
            self.optimizer = build(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

        def _scores(self, obs: Any, masks: Any) -> tuple[Any, Any]:
            scores = self.network(obs, th.as_tensor(masks).bool())
            distribution = self.action_dist.proba_distribution(action_logits=scores.logits)
            distribution.apply_masking(masks)
            return distribution, scores.value

        def forward(self, obs: Any, deterministic: bool = False, action_masks: Any = None) -> Any:
            distribution, values = self._scores(obs, action_masks)
            actions = distribution.get_actions(deterministic=deterministic)
            return actions, values, distribution.log_prob(actions)

        def evaluate_actions(self, obs: Any, actions: Any, action_masks: Any = None) -> Any:
            distribution, values = self._scores(obs, action_masks)
            return values, distribution.log_prob(actions), distribution.entropy()

        def predict_values(self, obs: Any) -> Any:  # at a rollout's end and at cut episodes, without a mask
            return self._scores(obs, th.ones(len(obs), self._rows, dtype=th.bool))[1]

    return StockPolicy
