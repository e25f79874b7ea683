"""The network: torch and compiled agree, rows are exchangeable, and training starts at the base rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decisions import BASE, network, random_decision

from engine.core.columns import CANDIDATE_DIMENSIONLESS, CONTEXT_DIMENSIONLESS, Kind
from policies.network import compiled
from policies.network.normalise import default_normalisation
from policies.network.scoring import ScoringNetwork, observation_size
from policies.rules import linear_score

torch.set_num_threads(1)


def single(ctx: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Inputs rounded to what float32 can hold, for both runtimes."""
    ctx, rows = ctx.astype(np.float32).astype(float), rows.astype(np.float32).astype(float)
    flat = np.concatenate([ctx[:CONTEXT_DIMENSIONLESS], rows[:, :CANDIDATE_DIMENSIONLESS].ravel()])
    return ctx, rows, torch.tensor(flat, dtype=torch.float32)[None]


def run_compiled(net: ScoringNetwork, ctx: np.ndarray, rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
    params = compiled.pack(net.arrays(), default_normalisation(), len(rows))
    memory = np.full(compiled.memory_cells(net.hidden, len(rows)), 3.0)  # leftovers must not matter
    return compiled.logits(ctx, rows, mask, params, memory).copy()


@pytest.mark.parametrize("hidden", [8, 32, 64])
def test_compiled_equals_torch(hidden: int) -> None:
    rng = np.random.default_rng(hidden)
    for trial in range(60):
        net = network(hidden, trial)
        ctx, rows, flat = single(*random_decision(rng, Kind(trial % 4), int(rng.integers(2, 20))))
        mask = (rng.random(len(rows)) < 0.7).astype(np.uint8)
        mask[rng.integers(len(rows))] = 1
        with torch.no_grad():
            want = net(flat, torch.tensor(mask)[None]).logits[0].numpy()
        got = run_compiled(net, ctx, rows, mask)
        allowed = mask > 0
        np.testing.assert_allclose(got[allowed], want[allowed], rtol=1e-5, atol=1e-5)
        assert np.isneginf(got[~allowed]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_both_runtimes_read_values_that_are_no_numbers_alike(bad: float) -> None:
    ctx, rows, _ = single(*random_decision(np.random.default_rng(0), Kind.PLACE_PREFILL, 5))
    ctx[8] = bad
    rows[1:3, 9:17] = bad
    ctx, rows, flat = single(ctx, rows)
    mask = np.ones(5, np.uint8)
    with torch.no_grad():
        want = network()(flat, torch.tensor(mask)[None]).logits[0].numpy()
    got = run_compiled(network(), ctx, rows, mask)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.isfinite(got).all()


def test_a_permutation_of_the_rows_permutes_the_logits_and_leaves_the_value() -> None:
    rng = np.random.default_rng(3)
    ctx, rows, flat = single(*random_decision(rng, Kind.PLACE_PREFILL, 7))
    order = rng.permutation(7)
    mask = np.array([1, 1, 0, 1, 1, 0, 1], np.uint8)
    _, _, shuffled = single(ctx, rows[order])
    with torch.no_grad():
        a = network()(flat, torch.tensor(mask)[None])
        b = network()(shuffled, torch.tensor(mask[order])[None])
    torch.testing.assert_close(a.logits[:, order], b.logits)
    torch.testing.assert_close(a.value, b.value)
    got = run_compiled(network(), ctx, np.ascontiguousarray(rows[order]), mask[order])
    np.testing.assert_allclose(got, run_compiled(network(), ctx, rows, mask)[order], rtol=1e-6)


def test_padding_with_masked_rows_changes_nothing() -> None:
    _, rows, flat = single(*random_decision(np.random.default_rng(4), Kind.PLACE_DECODE, 5))
    padding = torch.full((1, observation_size(3) - observation_size(0)), 77.0)
    with torch.no_grad():
        small = network()(flat, torch.ones(1, 5))
        large = network()(torch.cat([flat, padding], 1), torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]]))
    torch.testing.assert_close(large.logits[:, :5], small.logits)
    torch.testing.assert_close(large.value, small.value)
    assert large.logits[0, 5:].softmax(0).isfinite().all()
    assert (large.logits[0].softmax(0)[5:] == 0).all()


def test_an_untrained_network_decides_like_its_base_rule() -> None:
    rng = np.random.default_rng(5)
    net = ScoringNetwork(BASE, 16)
    rule_params = BASE.ravel()
    for trial in range(200):
        ctx, rows, _ = single(*random_decision(rng, Kind(trial % 4), 6))
        mask = (rng.random(6) < 0.7).astype(np.uint8)
        params = compiled.pack(net.arrays(), net.normalisation, 6)
        memory = np.zeros(compiled.memory_cells(16, 6))
        mine = compiled.decide(ctx, rows, mask, params, memory)
        # the network keeps its base in float32, the rule in float64: near-ties may fall either way
        cost = -compiled.logits(ctx, rows, mask, params, memory)
        rule = linear_score.decide(ctx, rows, mask, rule_params, np.zeros(1))
        assert mine == rule or abs(cost[mine] - cost[rule]) < 1e-4


def test_gradients_reach_every_trainable_weight() -> None:
    net = network()
    _, _, flat = single(*random_decision(np.random.default_rng(6), Kind.PLACE_PREFILL, 6))
    scores = net(flat, torch.ones(1, 6))
    (scores.logits[0, 0] + scores.value.sum()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert not net.base.requires_grad
    assert not net.gate.requires_grad


def test_more_candidates_than_bound_for_is_an_error_not_an_overrun() -> None:
    net = network()
    ctx, rows, _ = single(*random_decision(np.random.default_rng(7), Kind.PLACE_PREFILL, 6))
    params = compiled.pack(net.arrays(), net.normalisation, 5)
    with pytest.raises(ValueError, match="more candidates"):
        compiled.decide(ctx, rows, np.ones(6, np.uint8), params, np.zeros(compiled.memory_cells(16, 5)))
