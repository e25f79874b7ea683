"""The training benchmark compares like with like: one network, the same choices and probabilities on both sides."""

from __future__ import annotations

import torch as th
from gymnasium import spaces

from engine.core.columns import CANDIDATE_DIMENSIONLESS, CONTEXT_DIMENSIONLESS
from eval.benchmarks import training
from train.ppo.policy import ScoringPolicy

K, C, F = 6, CONTEXT_DIMENSIONLESS, CANDIDATE_DIMENSIONLESS
SPACES = spaces.Box(-100.0, 100.0, (C + K * F,)), spaces.Discrete(K)


def test_stock_and_ours_give_the_same_values_and_log_probabilities() -> None:
    ours = ScoringPolicy(*SPACES, lambda _: 1e-3, make_network=training._network, n_context=C, n_features=F)
    stock = training._stock_policy()(*SPACES, lambda _: 1e-3)
    th.nn.init.normal_(ours.network.out.weight)
    stock.network.load_state_dict(ours.network.state_dict())
    obs = th.randn(64, C + K * F)
    mask = th.rand(64, K) < 0.6
    mask[:, 0] = True
    actions, _, _ = stock.forward(obs, action_masks=mask)
    assert mask[th.arange(64), actions].all()
    expected, got = (p.evaluate_actions(obs, actions, mask) for p in (stock, ours))
    for one, other in zip(expected, got, strict=True):
        assert th.allclose(one, other, atol=1e-5)


def test_operations_are_counted_per_row_where_every_candidate_passes() -> None:
    network = training._network()
    few, many = (training.flops_per_frame(network, rows, 1) for rows in (1, 11))
    per_row = 2 * (network.candidate.weight.numel() + network.head.weight.numel() + network.out.weight.numel())
    assert many - few == 10 * per_row * 4
    assert training.flops_per_frame(network, 1, 2) == few / 4 * 7
