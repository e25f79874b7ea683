"""The written-out passes of the network against torch and autograd in double precision, and inside PPO."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from engine.core.columns import CANDIDATE_DIMENSIONLESS, CONTEXT_DIMENSIONLESS, Col, Kind
from env.gym.vector_env import SlalomVecEnv
from env.scenario import Scenario
from policies.network.scoring import ScoringNetwork
from policies.rules import linear_score
from train.config import TrainConfig
from train.ppo.batch import Batch, Samples
from train.ppo.fast.fused import Fused
from train.ppo.learner import DispatchPPO
from train.ppo.objective import Objective, differentiate
from train.ppo.policy import ScoringPolicy

K, C, F = 7, CONTEXT_DIMENSIONLESS, CANDIDATE_DIMENSIONLESS
BASE = linear_score.weights(linear_score.RULE.values())
GOAL = Objective(clip=0.2, entropy_weight=0.01, value_weight=0.5, shift=-3.0, scale=2.0)


def trained(hidden: int = 16, seed: int = 0) -> ScoringNetwork:
    """Gates, advice and random weights everywhere, as after training."""
    th.manual_seed(seed)
    net = ScoringNetwork(BASE, hidden, gate=np.random.default_rng(seed).normal(0, 0.2, (len(Kind), C, F + 3)),
                         bonus=np.full(len(Kind), 1.5))  # fmt: skip
    with th.no_grad():
        for parameter in (net.out.weight, net.context.bias, net.pool.bias, net.value[2].bias):
            parameter.normal_(0.0, 0.3)
    return net


def decisions(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Observations with advice, of all kinds, with padding, equal rows, columns of zeros, and values out of range."""
    rng = np.random.default_rng(seed)
    obs = np.zeros((n, C + K * F + K), np.float32)
    obs[np.arange(n), rng.integers(0, 4, n)] = 1.0
    obs[:, 4:C] = rng.exponential(0.7, (n, C - 4))
    rows = obs[:, C : C + K * F].reshape(n, K, F)
    rows[..., int(Col.TTFT) : int(Col.DRAINING)] = rng.normal(0.5, 1.0, (n, K, int(Col.DRAINING) - int(Col.TTFT)))
    rows[..., 0] = 1.0
    rows[:, 2] = rows[:, 1]
    rows[::3, K - 2 :] = 0.0
    obs[:, C : C + K * F] = rows.reshape(n, -1)
    obs[0, 8], obs[1, C + int(Col.TTFT)], obs[2, C + int(Col.WAIT)] = np.nan, np.inf, -np.inf
    obs[np.arange(n), C + K * F + rng.integers(0, K, n)] = 1.0
    masks = rng.random((n, K)) < 0.8
    masks[:, 1:3] = True
    masks[::3, K - 2 :] = False
    return obs, masks


def policy_of(net: ScoringNetwork) -> ScoringPolicy:
    box = spaces.Box(-100.0, 100.0, (C + K * F + K,))
    return ScoringPolicy(box, spaces.Discrete(K), lambda _: 1e-3, make_network=lambda: net, n_context=C, n_features=F)


def exact(net: ScoringNetwork) -> ScoringPolicy:
    """The same in double precision."""
    return policy_of(copy.deepcopy(net)).double()


def acted(net: ScoringNetwork, obs: np.ndarray, masks: np.ndarray, seed: int = 0) -> tuple[Any, Any, Any]:
    n = len(obs)
    fused = Fused(net, K)
    packed = fused.packed(n)
    uniform = np.random.default_rng(seed).random(n, np.float32)
    out = np.zeros(n, np.int64), np.zeros(n, np.float32), np.zeros(n, np.float32)
    fused.act(packed, 0, obs, masks, uniform, (-3.0, 2.0), out)
    return out


def test_actions_have_the_probability_and_value_that_torch_gives_them() -> None:
    net, (obs, masks) = trained(), decisions(300)
    actions, log_probs, values = acted(net, obs, masks)
    assert masks[np.arange(300), actions].all()
    oracle = exact(net)
    oracle.set_value_scale(-3.0, 2.0)
    with th.no_grad():
        want, log_want, _ = oracle.evaluate_actions(
            th.from_numpy(obs).double(), th.from_numpy(actions), th.from_numpy(masks)
        )
    np.testing.assert_allclose(values, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(log_probs, log_want, rtol=1e-5, atol=1e-5)


def test_actions_are_drawn_from_the_softmax() -> None:
    net, (obs, masks) = trained(), decisions(4)
    many = 20_000
    obs, masks = np.repeat(obs[3:], many, axis=0), np.repeat(masks[3:], many, axis=0)
    actions, _, _ = acted(net, obs, masks)
    with th.no_grad():
        expected = net(th.from_numpy(obs[:1]), th.from_numpy(masks[:1])).logits.softmax(-1)[0]
    np.testing.assert_allclose(np.bincount(actions, minlength=K) / many, expected, atol=0.015)


@pytest.mark.parametrize(("hidden", "actor"), [(16, True), (32, True), (40, True), (16, False)])
def test_gradients_are_those_of_autograd(hidden: int, actor: bool) -> None:
    n, rng = 700, np.random.default_rng(hidden)  # many chunks; narrower and wider than a tile
    net, (obs, masks) = trained(hidden), decisions(n)
    actions, log_probs, _ = acted(net, obs, masks)
    log_probs += rng.normal(0, 0.2, n).astype(np.float32)  # so that some ratios are clipped on either side
    samples = Samples(
        actions, log_probs, rng.normal(0, 1, n).astype(np.float32), rng.normal(-3, 2, n).astype(np.float32)
    )
    goal = Objective(**(vars(GOAL) | {"actor": actor}))
    order = rng.permutation(n)[:600]
    fused, oracle = Fused(net, K), exact(net)
    oracle.set_value_scale(goal.shift, goal.scale)
    packed = fused.packed(n)
    packed.fill(obs, masks)
    losses = fused.differentiate(packed, samples, order, goal)
    parts = (obs, masks, *samples)
    observations, allowed, *rest = (th.from_numpy(part[order]) for part in parts)
    wanted = differentiate(
        oracle, Batch(observations.double(), allowed, rest[0], *(t.double() for t in rest[1:])), goal
    )
    np.testing.assert_allclose(losses, wanted, rtol=1e-5, atol=1e-6)
    for (name, got), want in zip(net.named_parameters(), oracle.network.parameters(), strict=True):
        if want.grad is None:
            assert got.grad is None, name
            continue
        assert got.grad is not None, name
        scale = float(want.grad.abs().max())
        assert scale > 0, name
        np.testing.assert_allclose(got.grad, want.grad, rtol=1e-5, atol=1e-5 * scale, err_msg=name)


def real_model(**changes: Any) -> DispatchPPO:
    env = SlalomVecEnv(Scenario.load("tiny-4xa100"), 8, n_requests=60, seed=2, groups=2)
    settings: dict[str, Any] = {"n_envs": 8, "groups": 2, "n_steps": 48, "batch_size": 128, "hidden": 8}
    config = TrainConfig(**(settings | {"critic_warmup": 0} | changes))
    th.manual_seed(1)
    return DispatchPPO(env, lambda: ScoringNetwork(BASE, 8, 2.0), config, seed=3)


def weights(model: DispatchPPO) -> np.ndarray:
    return th.cat([p.detach().ravel() for p in model.policy.trainable]).numpy()


def test_clusters_that_play_one_by_one_live_the_same_lives_as_in_lockstep() -> None:
    alone, lockstep = real_model(n_steps=96), real_model(n_steps=96)  # episodes of 60 requests end on the way
    assert alone.player is not None
    lockstep.player = None
    for model in (alone, lockstep):
        model.learn(8 * 96)
    rounded = ("rewards", "returns", "advantages")  # the value at an episode's end was computed for one or several
    for name, column in vars(alone.rollout_buffer).items():
        if isinstance(column, np.ndarray):
            other, tolerance = getattr(lockstep.rollout_buffer, name), 1e-5 if name in rounded else 0.0
            np.testing.assert_allclose(column, other, rtol=tolerance, atol=tolerance, err_msg=name)
    np.testing.assert_allclose(weights(alone), weights(lockstep), atol=1e-5)
    np.testing.assert_array_equal(alone._last_obs, lockstep._last_obs)
    np.testing.assert_array_equal(alone._last_episode_starts, lockstep._last_episode_starts)
    np.testing.assert_array_equal(alone.clock_s, lockstep.clock_s)
    np.testing.assert_array_equal(alone.policy.seen, lockstep.policy.seen)
    told = [sorted((e["r"], e["l"]) for e in model.ep_info_buffer) for model in (alone, lockstep)]
    assert told[0] == told[1]
    assert told[0]


def test_an_update_moves_the_weights_as_autograd_does(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = real_model(), real_model()
    assert fused.policy.fused is not None
    start = weights(fused)
    for model, ours in ((fused, True), (plain, False)):
        train = model.train

        def update(model: DispatchPPO = model, ours: bool = ours, train: Any = train) -> None:
            if not ours:  # the rollout is there; from here on by torch alone
                model.policy.fused = None
            train()

        monkeypatch.setattr(model, "train", update)
        model.learn(8 * 48)
    moved = np.abs(weights(fused) - start).max()
    assert moved > 1e-4
    np.testing.assert_allclose(weights(fused), weights(plain), atol=2e-3 * moved)


def test_a_rollout_collected_elsewhere_is_packed_alike() -> None:
    model = real_model()
    model.learn(8 * 48)
    buffer = model.rollout_buffer
    packed = buffer.packed
    assert packed is not None
    store = packed.store
    rows = [np.arange(a, a + n) for a, n in zip(store.first, store.n_rows, strict=True)]
    before = {name: getattr(store, name)[np.concatenate(rows)] for name in ("rows", "cost", "advised", "which")}
    context, greatest = store.context.copy(), store.greatest.copy()
    packed.complete = False
    buffer.pack()
    np.testing.assert_array_equal(context, store.context)
    np.testing.assert_array_equal(greatest, store.greatest)
    for name, array in before.items():  # now in the order of time, without a look at the clusters
        np.testing.assert_array_equal(array, getattr(store, name)[: len(array)], err_msg=name)
    np.testing.assert_allclose(
        model.policy.predict_values(th.from_numpy(model._last_obs)),
        model.policy._scores(th.from_numpy(model._last_obs), None)[1].detach(),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_decisions_of_two_workers_arrive_as_they_were_packed() -> None:
    obs, masks = decisions(24)
    fused = Fused(trained(), K)
    whole, parts = fused.packed(24), [fused.packed(12) for _ in range(2)]
    whole.fill(obs, masks)
    joined = fused.packed(24)
    for env, part in zip((0, 2), parts, strict=True):  # 6 steps of 4 environments, two with either worker
        mine = (np.arange(24) % 4 >= env) & (np.arange(24) % 4 < env + 2)
        part.fill(obs[mine], masks[mine])
        joined.add(part.parcel(), 6, env)
    got, want = joined.store, whole.store
    for name in ("context", "n_rows", "greatest", "columns", "n_columns", "used"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    at, wanted = (
        np.concatenate([np.arange(a, a + n) for a, n in zip(s.first, s.n_rows, strict=True)]) for s in (got, want)
    )
    for name in ("rows", "cost", "advised", "which"):
        np.testing.assert_array_equal(getattr(got, name)[at], getattr(want, name)[wanted], err_msg=name)


def test_what_was_seen_is_bounded_without_padding() -> None:
    policy = policy_of(trained())
    obs, _ = decisions(50)
    obs = np.nan_to_num(obs)
    policy.note_seen(obs[:20])
    policy.note_seen(obs[20:])
    rows = obs[:, C : C + K * F].reshape(-1, F)
    rows = rows[rows.any(1)]
    for side, extreme in enumerate((np.min, np.max)):
        want = np.concatenate([extreme(obs[:, :C], 0), extreme(rows, 0)])
        np.testing.assert_array_equal(policy.seen[side], want)
