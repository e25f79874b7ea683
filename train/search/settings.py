"""``python -m train.search.settings``: PPO's own hyper-parameters by search, each trial a short training.

    python -m train.search.settings --scenario azure-conv-4xa100 --trials 40 --budget 20s --out runs/settings

All trials start from the same base (found once, with the same budget) and are judged on the same validation windows:
the best snapshot so far counts, as in ``train-policy``. A trial that falls behind the median of those before it at the
same point of its budget is pruned. The first trial is the defaults. In the end the winner and the defaults train once
more, with a seed and on windows that the search has not seen, and ``OUT/config.yaml`` holds the winner for
``train-policy --config``. The journal in OUT makes a search that was stopped go on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import torch
import yaml
from optuna.trial import TrialState

from engine.common.files import write_json, write_text
from engine.common.options import refuses
from engine.errors import SlalomError
from env.measure.contender import Contender
from env.scenario import Scenario
from train.budget import Budget, parse_budget
from train.config import TrainConfig, load_config
from train.export import Publisher
from train.ppo.callbacks import Between
from train.ppo.judge import SimulatorJudge
from train.ppo.learner import DispatchPPO
from train.run import Request, make_env, run_or_read
from train.search.record import open_journal
from train.search.rule import SearchResult

_POINTS = 4  # judgements of one trial
_FIRST_SEED, _FRESH_SEED = 5_000, 6_000  # validation windows of the search, and of the last comparison
_FRESH_TRAINING = 1_000  # added to the seed of the last comparison

#: Field → choices, or (low, high) on a logarithmic scale.
SPACE: dict[str, tuple[Any, ...] | list[Any]] = {
    "learning_rate": (1e-4, 5e-3),
    "n_steps": [64, 128, 256, 512],
    "batch_size": [1024, 2048, 4096, 8192],
    "n_epochs": [1, 2, 3, 4],
    "ent_coef": (1e-5, 1e-2),
    "horizon_s": (2.0, 60.0),
    "gae_lambda": [0.9, 0.95, 0.98, 0.99, 0.995],
    "hidden": [16, 32, 64],
}


def suggest(trial: optuna.Trial, config: TrainConfig) -> dict[str, Any]:
    """Values of a trial; the space reaches as far as ``config``, whose values are the first trial.

    The learning rate ends at a tenth of where it starts.
    """
    values: dict[str, Any] = {}
    for name, span in SPACE.items():
        here = getattr(config, name)
        if isinstance(span, list):
            values[name] = trial.suggest_categorical(name, sorted({*span, here}))
        else:
            values[name] = trial.suggest_float(name, min(span[0], here), max(span[1], here), log=True)
    return _ended(values)


def _ended(values: dict[str, Any]) -> dict[str, Any]:
    """With the learning rate that follows from them."""
    return values | {"learning_rate_final": 0.1 * values["learning_rate"]}


class _Until(Between):
    """Stops a training between updates where ``done`` says so."""

    def __init__(self, done: Callable[[DispatchPPO], bool]) -> None:
        super().__init__()
        self._done = done

    def _on_rollout_start(self) -> None:
        self.model.stop = self._done(self.model)


@dataclass(frozen=True)
class _Course:
    """What all trainings have in common."""

    scenario: Scenario
    base: SearchResult
    config: TrainConfig
    budget: Budget
    folder: Path

    def judge(self, policy: Path, first: int) -> float:
        """Mean attainment around the knee of the base, on validation windows from ``first``."""
        rates = [load * self.base.knee for load in self.config.eval_loads]
        judge = SimulatorJudge(self.scenario, rates, self.config.eval_requests, background=False)
        seeds = range(first, first + self.config.eval_seeds)
        return judge.submit(Contender(str(policy)), seeds).result().score

    def train(
        self, name: str, values: dict[str, Any], seed: int, watch: Callable[[int, float], None] = lambda k, score: None
    ) -> tuple[Path, float]:
        """One training; its best snapshot on the windows of the search, the base included, and its score there.

        :param watch: told the score of the best so far after each part of the budget; may raise
        """
        config = load_config(None, self.scenario.name, **(self.config.model_dump() | values))
        publisher = Publisher(self.scenario, self.base, config, seed)
        env = make_env(publisher)
        try:
            model = DispatchPPO(env, publisher.new_network, config, seed=seed)
            best, most = Path(self.base.folder), self.judge(Path(self.base.folder), _FIRST_SEED)
            for k in range(1, _POINTS + 1):
                self._learn(model, k / _POINTS)
                snapshot = self.folder / name / f"{k}"
                publisher.network(snapshot, model)
                score = self.judge(snapshot, _FIRST_SEED)
                if score > most:
                    best, most = snapshot, score
                watch(k, most)
            return best, most
        finally:
            env.close()

    def _learn(self, model: DispatchPPO, share: float) -> None:
        """Go on until ``share`` of the budget is spent; schedules follow the whole of it."""
        frames = self.budget.frames or 10**15
        seconds = self.budget.seconds
        left = frames - model.num_timesteps
        if left > 0:
            until = _Until(lambda m: m.num_timesteps >= share * frames or m.trained_s >= share * seconds)
            model.learn(left, until, log_interval=0, reset_num_timesteps=model.num_timesteps == 0, time_limit_s=seconds)


def search(
    scenario: str, trials: int, budget: Budget, out: Path, *, seed: int = 0, rule: str = "auto",
    config: Path | None = None, overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Search, compare, write ``OUT/config.yaml``; the result is also in ``OUT/result.json``.

    :param rule: what PPO starts from; ``auto``: a direct search over all rules
    :raises SlalomError: bad scenario, budget, configuration or folder
    """
    if trials < 1:
        raise SlalomError("--trials", trials, "try at least one setting")
    chosen = Scenario.load(scenario)
    settings = load_config(config, chosen.name, **(overrides or {}))
    torch.set_num_threads(settings.torch_threads)
    algorithm = "direct" if rule == "auto" else "search"
    start = Request(scenario, algorithm, rule, budget, seed, out / "base", config=config, overrides=overrides or {})
    run_or_read(start)
    base = replace(SearchResult.read(out / "base" / "base.json"), folder=str(out / "base" / "best"))
    course = _Course(chosen, base, settings, budget, out / "trials")
    study = _study(out, seed, f"{chosen.name} {budget} {seed}")
    if not study.trials:
        study.enqueue_trial({name: getattr(settings, name) for name in SPACE})

    def objective(trial: optuna.Trial) -> float:
        def watch(k: int, score: float) -> None:
            trial.report(score, k)
            if k < _POINTS and trial.should_prune():
                raise optuna.TrialPruned

        _, value = course.train(f"{trial.number:04d}", suggest(trial, settings), seed, watch)
        print(f"settings: trial {trial.number}: {100 * value:.2f} %", file=sys.stderr, flush=True)
        return value

    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    left = trials - len(study.get_trials(deepcopy=False, states=ended))
    if left > 0:
        study.optimize(objective, n_trials=left)
    return _finish(study, course, settings, seed, out)


def _study(out: Path, seed: int, name: str) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        study_name=name, storage=open_journal(out / "study.journal"), direction="maximize", load_if_exists=True,
        sampler=optuna.samplers.TPESampler(
            seed=seed, multivariate=True, n_startup_trials=8, warn_independent_sampling=False
        ),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
    )  # fmt: skip


def _finish(study: optuna.Study, course: _Course, settings: TrainConfig, seed: int, out: Path) -> dict[str, Any]:
    """Winner and defaults once more, on fresh seeds; then the files."""
    won = _ended(study.best_params)
    fresh = {
        name: course.judge(course.train(f"fresh-{name}", values, seed + _FRESH_TRAINING)[0], _FRESH_SEED)
        for name, values in (("winner", won), ("defaults", {}))
    }
    base = course.judge(Path(course.base.folder), _FRESH_SEED)
    states = [trial.state for trial in study.trials]
    result = {
        "scenario": course.scenario.name,
        "trials": states.count(TrialState.COMPLETE),
        "pruned": states.count(TrialState.PRUNED),
        "settings": won,
        "score_in_search": study.best_value,
        "fresh": fresh | {"base": base},
        "config": str(out / "config.yaml"),
    }
    write_text(out / "config.yaml", yaml.safe_dump({course.scenario.name: won}, sort_keys=False))
    write_json(out / "result.json", result)
    return result


@refuses("settings")
def main(arguments: list[str] | None = None) -> int:
    """Command line; a mistake of the user is one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m train.search.settings", description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", default="azure-conv-4xa100")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--budget", default="20s", help="of each training and of the base: 20s, 2m, 500k frames")
    parser.add_argument("--rule", default="auto", help="what PPO starts from; auto: a direct search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, help="YAML with the hyper-parameters that are not searched")
    parser.add_argument("--out", type=Path, default=Path("runs/settings"))
    options = parser.parse_args(arguments)
    try:
        budget = parse_budget(options.budget)
        result = search(
            options.scenario, options.trials, budget, options.out, seed=options.seed, rule=options.rule,
            config=options.config,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("settings: stopped; the same command goes on", file=sys.stderr)
        return 130
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
