"""Learning on the stub environment: masks, the base rule as a start, improvement, determinism."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from dispatch_stub import StubEnv, StubNetwork
from stable_baselines3.common.callbacks import CallbackList

from train.config import TrainConfig
from train.ppo.learner import DispatchPPO

Make = Callable[..., DispatchPPO]


def weights(model: DispatchPPO) -> np.ndarray:
    return th.cat([p.detach().ravel() for p in model.policy.parameters()]).numpy()


def test_starts_as_the_base_rule(make_model: Make) -> None:
    model = make_model()
    env = StubEnv(64, seed=3)
    obs, masks = env.reset(), env.action_masks()
    action, _ = model.policy.predict(obs, deterministic=True, action_masks=masks)
    rows = obs[:, 3:].reshape(64, 4, 4)
    score = np.where(masks, -(rows[..., 1] + rows[..., 2]), -np.inf)
    np.testing.assert_array_equal(action, score.argmax(1))


def test_masked_actions_are_never_drawn_and_have_no_probability(make_model: Make) -> None:
    model = make_model()
    obs = th.randn(4000, 19)
    mask = th.rand(4000, 4) < 0.4
    mask[:, 0] |= ~mask.any(1)
    actions, _, log_prob = model.policy.forward(obs, action_masks=mask)
    assert mask[th.arange(4000), actions].all()
    assert th.isfinite(log_prob).all()
    _, other, entropy = model.policy.evaluate_actions(obs, (~mask).int().argmax(1), mask)
    forbidden = ~mask.all(1)
    assert (other[forbidden] < -1e7).all()
    assert (entropy >= -1e-6).all()
    assert th.isfinite(entropy).all()


def test_what_was_seen_is_bounded_without_padding(make_model: Make) -> None:
    policy = make_model().policy
    obs = th.randn(50, 19).numpy() + 3.0
    rows = obs[:, 3:].reshape(50, 4, 4)
    rows[::3, 2:] = 0.0  # padding
    policy.note_seen(obs[:20])
    policy.note_seen(obs[20:])
    real = rows[rows.any(-1)]
    for side, extreme in enumerate((np.min, np.max)):
        want = np.concatenate([extreme(obs[:, :3], 0), extreme(real, 0)])
        np.testing.assert_array_equal(policy.seen[side], want)


def test_sampling_follows_the_softmax(make_model: Make) -> None:
    policy = make_model().policy
    obs = th.randn(1, 19).expand(20_000, -1).clone()
    mask = th.tensor([[True, False, True, True]]).expand(20_000, -1)
    actions, _, _ = policy.forward(obs, action_masks=mask)
    expected = policy.get_distribution(obs[:1], mask[:1]).distribution.probs[0]
    got = th.bincount(actions, minlength=4) / 20_000
    assert th.allclose(got, expected, atol=0.015)


@pytest.mark.slow
def test_learning_beats_the_base_rule_and_keeps_it_frozen(make_model: Make) -> None:
    model = make_model(learning_rate=5e-3, learning_rate_final=5e-3, target_kl=None, n_epochs=4)
    # a base rule that ignores queues leaves room to learn
    with th.no_grad():
        model.policy.network.base[1] = 0.0
    base = model.policy.network.base.clone()
    before = model.learn(1024).logger  # fills the episode statistics with near-base behaviour
    assert before is model.logger
    start = np.mean([e["r"] for e in model.ep_info_buffer])
    model.learn(60_000, reset_num_timesteps=False)
    end = np.mean([e["r"] for e in model.ep_info_buffer])
    assert end > start + 2.0
    assert th.equal(model.policy.network.base, base)
    assert all(p.requires_grad for p in model.policy.trainable)


def test_same_seed_same_weights(make_model: Make) -> None:
    first, second, third = make_model(seed=5), make_model(seed=5), make_model(seed=6)
    first.learn(3000)
    np.random.seed(99)  # noqa: NPY002 - a disturbance from outside must not matter
    th.rand(7)
    second.learn(3000)
    third.learn(3000)
    np.testing.assert_array_equal(weights(first), weights(second))
    assert not np.array_equal(weights(first), weights(third))


def test_critic_warmup_leaves_decisions_alone(make_model: Make) -> None:
    model = make_model(critic_warmup=3)
    obs, mask = th.randn(32, 19), th.ones(32, 4, dtype=th.bool)
    before = model.policy.get_distribution(obs, mask).distribution.logits.detach().clone()
    start = weights(model)
    model.learn(3 * 512)
    after = model.policy.get_distribution(obs, mask).distribution.logits.detach()
    assert th.equal(before, after)
    assert not np.array_equal(start, weights(model))


def test_time_limit_is_bootstrapped_with_the_elapsed_discount(make_model: Make) -> None:
    """A critic that says V everywhere adds exp(-beta dt) V to a cut episode's last reward only."""
    model = make_model()
    model.learn(512)
    with th.no_grad():
        model.policy.network.value.weight.zero_()
        model.policy.network.value.bias.fill_(3.0)
    value = float(model.policy.value_shift + 3.0 * model.policy.value_scale)
    raw: list[np.ndarray] = []
    step_wait = model.env.step_wait

    def spy():  # the rewards as the environment gives them
        result = step_wait()
        raw.append(result[1].copy())
        return result

    model.env.step_wait = spy
    callback = CallbackList([])
    callback.init_callback(model)
    buffer = model.rollout_buffer
    assert model.collect_rollouts(model.env, callback, buffer, buffer.buffer_size)
    cut = np.concatenate([buffer.episode_starts[1:], model._last_episode_starts[None]]).astype(bool)
    assert cut.any()
    expected = np.array(raw) + cut * np.exp(-buffer.beta * buffer.elapsed_s) * value
    np.testing.assert_allclose(buffer.rewards, expected, rtol=1e-5, atol=1e-6)


def test_time_limit_stops_learning(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock on which an update takes a second and nothing else takes time."""
    model, updates = make_model(), []
    train = model.train

    def update() -> None:
        updates.append(len(updates))
        train()

    monkeypatch.setattr(model, "train", update)
    monkeypatch.setattr("train.ppo.learner.time", SimpleNamespace(perf_counter=lambda: float(len(updates))))
    model.learn(10**9, time_limit_s=2.5)
    assert (len(updates), model.trained_s) == (3, 3.0)


def test_learning_leaves_no_log_in_the_temporary_files(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make_model().learn(512)
    assert not list(tmp_path.glob("SB3*"))


def test_time_split_is_reported(make_model: Make) -> None:
    model = make_model()
    model.learn(2048)
    shares = model.split.shares()
    assert {"env", "forward", "copy", "update"} <= shares.keys()
    assert sum(shares.values()) == pytest.approx(1.0)


def test_value_scale_is_set_once_and_near_the_steady_state() -> None:
    env = StubEnv(16, seed=0)
    model = DispatchPPO(env, StubNetwork, TrainConfig(n_envs=16, groups=4, n_steps=64, batch_size=256), seed=0)
    model.learn(1024)
    shift, scale = float(model.policy.value_shift), float(model.policy.value_scale)
    buffer = model.rollout_buffer
    assert abs(shift - buffer.returns.mean()) < 5 * scale
    model.learn(2048, reset_num_timesteps=False)
    assert (float(model.policy.value_shift), float(model.policy.value_scale)) == (shift, scale)
