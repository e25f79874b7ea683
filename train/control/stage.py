"""A controller from its search to a checkpoint, with the display and the folder of a training."""

from __future__ import annotations

from dataclasses import asdict

from engine.common.files import write_json
from engine.common.progress import Display
from env.scenario import Scenario
from train.budget import Budget
from train.config import TrainConfig
from train.control.days import CONTROLLER, train_controller
from train.export import Publisher
from train.folder import RunFolder
from train.search.rule import SearchResult

__all__ = ["CONTROLLER", "learn_controller"]


def learn_controller(
    scenario: Scenario, budget: Budget, seed: int, config: TrainConfig, folder: RunFolder, display: Display
) -> SearchResult:
    """The planner's parameters, learned on days of training arrivals, and published in ``folder.best``.

    :raises SlalomError: no drift to follow, or roles that the planner cannot use
    """
    requests = budget.frames or float("inf")
    found = train_controller(scenario, seconds=budget.seconds, requests=requests, seed=seed, report=display.report)
    write_json(folder.base, asdict(found))
    table = [
        {"policy": "this controller", "score": round(found.score, 5), "split": "valid"},
        {"policy": f"{found.rule} as it is", "score": round(found.default_score, 5), "split": "valid"},
    ]
    Publisher(scenario, found, config, seed).start(folder.best, table)
    return found
