"""Learning by how much to shift what a tuned planner wants: imitation of who knows the phases, and PPO.

imitation   DAgger (Ross et al. 2011): a teacher who knows when phases change finds out on training days which
            shifts pay; first it acts itself, then the network does and the teacher says what it should have done;
            the network is fitted to all that was said
PPO         on days of training arrivals, eight clusters on the same ones, each the others' baseline; rewards are
            misses and waits that are too long, discounted by elapsed time over twenty minutes
choice      of start and results by where validation days stand: never worse there than what it began with
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor, nn

from env.gym.control_env import ControlVecEnv
from env.measure.phases import phases_of, play_days, standing
from env.scenario import Scenario
from env.surrogate.arena import arena_of
from env.workload import Trace
from policies.network.scoring import MASKED, Scores
from policies.rule import BoundPolicy, Values
from policies.rules.parts.shift import KEEP, N_INPUTS, NO_NETWORK, SHIFTS, pack, shapes
from policies.rules.planner import RULE, shifted
from train.config import TrainConfig
from train.control.days import BEYOND, MEAN, VALID_DAYS
from train.ppo.learner import DispatchPPO

_HIDDEN = 32
_STEP_S = float(NO_NETWORK[0])
_WINDOWS_S = ((0.0, 30.0), (30.0, 60.0), (60.0, 120.0))  # after a change of phase, in which a teacher may shift
_SHOWN = 2  # days on which it finds out
_PUPILS, _ROUNDS = 4, 6  # days of a round of imitation; rounds
_FITS, _FIT_RATE = 400, 3e-3  # steps of Adam after each round, and their size
_IMITATION = 0.3  # share of the requests, where PPO follows
_CONFIG = TrainConfig.model_validate({
    "n_envs": 8, "groups": 1, "n_steps": 240, "batch_size": 480, "n_epochs": 6, "horizon_s": 1200.0,
    "gae_lambda": 0.95, "learning_rate": 1e-3, "learning_rate_final": 1e-4, "target_kl": 0.05, "critic_warmup": 2,
    "baseline_slice_s": _STEP_S, "ent_coef": 1e-3,
})  # fmt: skip


class ShiftNetwork(nn.Module):
    """The network of ``policies.rules.parts.shift`` in torch, and a critic; at the start it shifts nothing."""

    keep: Tensor

    def __init__(self, hidden: int = _HIDDEN) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(N_INPUTS, hidden), nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, len(SHIFTS))
        self.value = nn.Sequential(
            nn.Linear(N_INPUTS, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1)
        )
        self.register_buffer("keep", th.tensor([KEEP] + [0.0] * (len(SHIFTS) - 1)))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, observations: Tensor, mask: Tensor) -> Scores:
        """:param observations: float32 (B, ·), inputs first; ``mask`` bool (B, len(SHIFTS))"""
        x = observations[:, :N_INPUTS]
        logits = self.out(th.tanh(self.second(th.tanh(self.first(x))))) + self.keep
        return Scores(logits.masked_fill(~mask, MASKED), self.value(x).squeeze(-1))

    def arrays(self) -> dict[str, np.ndarray]:
        """The actor's weights as ``policies.rules.parts.shift`` names them."""
        state = self.state_dict()
        return {name: state[name].detach().numpy().copy() for name in shapes(_HIDDEN)}


@dataclass(frozen=True)
class Shifting:
    """What was learned, and what it cost.

    :param block: of ``policies.rules.parts.shift``; that of no network where nothing learned was better
    :param chosen: name of the stage that it is from
    :param plan: of the teacher: a shift for each of ``_WINDOWS_S`` after prompts bring more work, then after less
    :param blocks: of all stages, by name; ``standings``: where validation days stand with them on average
    """

    block: np.ndarray
    chosen: str
    plan: tuple[int, ...]
    blocks: dict[str, np.ndarray]
    standings: dict[str, float]
    requests: int


class _Teacher:
    """Says by how much to shift when, of somebody who knows the phases of a day.

    In the first minutes after prompts bring more work, and after they bring less, every shift is tried in every window
    of ``_WINDOWS_S``, all of them on the same days; then those that helped together, and their neighbours.

    :param make: environments for a number of clusters on the same day, given that number and a seed
    """

    def __init__(self, make: Callable[[int, int], ControlVecEnv]) -> None:
        self.make, self.requests = make, 0
        nothing = (0,) * (2 * len(_WINDOWS_S))
        singles = [nothing, *_neighbours(nothing)]
        worth = self._worth(singles)
        better = [plan for plan, value in zip(singles, worth, strict=True) if value > worth[0]]
        together = tuple(max(entries, key=abs) for entries in zip(nothing, *better, strict=True))
        plans = [nothing, singles[int(np.argmax(worth))], together, *_neighbours(together)]
        self.plan = plans[int(np.argmax(self._worth(plans)))]

    def _worth(self, plans: list[tuple[int, ...]]) -> np.ndarray:
        """Share in time of the worst phase, and a tenth of the mean of all, of every plan, summed over the days."""
        found = np.zeros(len(plans))
        for number in range(_SHOWN):
            env = self.make(len(plans), number)
            env.reset()
            day = env.episodes.requests(0)
            changes, ends = _changes(day), np.array([end for _, end in phases_of(day)])
            lost = np.zeros((len(ends), len(plans)))
            for _ in range(_looks(env)):
                now = env.episodes.now_s(0)
                phase = min(int(np.searchsorted(ends, now, side="right")), len(ends) - 1)
                lost[phase] += env.step(np.array([SHIFTS.index(_planned(plan, changes, now)) for plan in plans]))[1]
            sent = np.diff(np.searchsorted(day.arrival_s[: day.n_roots], np.concatenate([[0.0], ends])))
            share = 1.0 + lost / np.maximum(sent, 1)[:, None]
            found += share.min(axis=0) + MEAN * share.mean(axis=0)
            self.requests += len(plans) * env.episodes.n_requests
        return found

    def says(self, env: ControlVecEnv, changes: list[list[tuple[float, bool]]]) -> Tensor:
        """Its answer for every cluster, as an action; 0 where that is masked."""
        told = [SHIFTS.index(_planned(self.plan, day, env.episodes.now_s(b))) for b, day in enumerate(changes)]
        allowed = env.action_masks()[np.arange(env.num_envs), told]
        return th.from_numpy(np.where(allowed, told, 0))


def _neighbours(plan: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Plans that differ by one instance in one window."""
    steps = [(k, plan[k] + by) for k in range(len(plan)) for by in (-1, 1) if plan[k] + by in SHIFTS]
    return [(*plan[:k], shift, *plan[k + 1 :]) for k, shift in steps]


def _planned(plan: tuple[int, ...], changes: list[tuple[float, bool]], now_s: float) -> int:
    """The shift at a time: by the windows after the last change, those to more prompt work first."""
    for start, more in reversed(changes):
        for k, (first, last) in enumerate(_WINDOWS_S):
            if start + first <= now_s < start + last:
                return plan[k if more else len(_WINDOWS_S) + k]
    return 0


def _changes(day: Trace) -> list[tuple[float, bool]]:
    """(seconds, whether prompts bring more work from then on) of the phases of a day that differ in it."""
    windows = phases_of(day)
    arrival, prompt = day.arrival_s[: day.n_roots], day.prompt[: day.n_roots]
    load = [float(prompt[(arrival >= a) & (arrival < b)].sum()) / (b - a) for a, b in windows]
    pairs = zip(windows[1:], load, load[1:], strict=False)
    return [
        (start, after > before) for (start, _), before, after in pairs if not 0.8 < after / max(before, 1e-9) < 1.25
    ]


def _looks(env: ControlVecEnv) -> int:
    """Of a day, before any cluster has received its last request."""
    return int(env.scenario.workload.natural_s / _STEP_S) - 10


def _imitate(network: ShiftNetwork, env: ControlVecEnv, teacher: _Teacher, most: float) -> None:
    """DAgger on days of training arrivals, until ``most`` requests were simulated or all rounds are done."""
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    optimiser = th.optim.Adam(network.parameters(), lr=_FIT_RATE)
    for turn in range(_ROUNDS):
        env.episodes.number[:] = turn
        seen = th.from_numpy(env.reset())
        changes = [_changes(env.episodes.requests(b)) for b in range(env.num_envs)]
        for _ in range(_looks(env)):
            mask, told = th.from_numpy(env.action_masks().copy()), teacher.says(env, changes)
            kept.append((seen, mask, told))
            with th.no_grad():
                does = told if turn == 0 else network(seen, mask).logits.argmax(1)
            seen = th.from_numpy(env.step(does.numpy())[0])
        teacher.requests += env.num_envs * env.episodes.n_requests
        _fit(network, optimiser, kept)
        if teacher.requests >= most:
            return


def _fit(network: ShiftNetwork, optimiser: th.optim.Adam, kept: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Cross-entropy on all that was said so far."""
    seen, mask, told = (th.cat(parts) for parts in zip(*kept, strict=True))
    for _ in range(_FITS):
        some = th.randint(len(told), (1024,))
        loss = nn.functional.cross_entropy(network(seen[some], mask[some]).logits, told[some])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


class _Snapshots(BaseCallback):
    """Weights halfway and at the end."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.half: dict[str, np.ndarray] | None = None

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.half is None and self.num_timesteps >= 0.5 * self.frames:
            self.half = self.model.policy.network.arrays()  # type: ignore[union-attr, operator]


def learn_shift(
    scenario: Scenario,
    values: Values,
    rate: float,
    *,
    requests: float,
    seed: int = 0,
    imitation: bool = True,
    ppo: bool = True,
) -> Shifting:
    """A network that shifts the planner with ``values``, or none where that stands better on validation days.

    :param scenario: with days as long as training plays them
    :param rate: arrivals per second of training and validation days
    :param requests: simulated for all of it, about
    """
    values, day = RULE.values(values), math.ceil(rate * scenario.workload.natural_s)
    planner = RULE.bind(values, arena_of(scenario).setting)
    blocks, plan, spent = {"start": NO_NETWORK}, (), len(VALID_DAYS) * day * (1 + imitation + 2 * ppo)

    def world(n: int, number: int, groups: int = 1) -> ControlVecEnv:
        return ControlVecEnv(scenario, n, values=values, rate=rate, seed=101 * seed + number, groups=groups)

    with th.random.fork_rng(devices=[]):
        th.manual_seed(seed)
        network = ShiftNetwork()
        if imitation:
            teacher = _Teacher(world)
            most = (_IMITATION if ppo else 1.0) * requests - spent
            _imitate(network, world(_PUPILS, 100, _PUPILS), teacher, most)
            blocks["imitation"], plan, spent = pack(network.arrays()), teacher.plan, spent + teacher.requests
        if ppo:
            frames = max(int((requests - spent) / (rate * _STEP_S)), 1)
            learned, frames = _reinforce(network, world(_CONFIG.n_envs, 99), frames, seed)
            blocks, spent = blocks | learned, spent + int(frames * rate * _STEP_S)
    found = {name: _validated(scenario, shifted(planner, block), rate) for name, block in blocks.items()}
    chosen = max(found, key=lambda name: found[name])
    return Shifting(blocks[chosen], chosen, plan, blocks, found, spent)


def _reinforce(network: ShiftNetwork, env: ControlVecEnv, frames: int, seed: int) -> tuple[dict[str, np.ndarray], int]:
    """PPO from ``network``: blocks halfway and at the end, and the frames that it took, ``frames`` or a few more."""
    model, halfway = DispatchPPO(env, lambda: deepcopy(network), _CONFIG, seed=seed), _Snapshots(frames)
    model.learn(frames, halfway, log_interval=0)
    learned: Any = model.policy.network
    blocks = {"ppo, end": pack(learned.arrays())}
    return blocks if halfway.half is None else {"ppo, half": pack(halfway.half)} | blocks, model.num_timesteps


def _validated(scenario: Scenario, policy: BoundPolicy, rate: float) -> float:
    played = (play_days(scenario, policy, BEYOND * rate, day, "valid") for day in VALID_DAYS)
    return float(np.mean([standing(scenario, *found) for found in played]))
