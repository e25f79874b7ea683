"""A controller from its search to a checkpoint, with the display and the folder of a training."""

from __future__ import annotations

from engine.common.progress import Display
from env.scenario import Scenario
from train.budget import Budget
from train.config import TrainConfig
from train.control.days import CONTROLLER, RULE, tune_on_days
from train.control.space import Values
from train.export import Publisher
from train.folder import RunFolder
from train.ppo.callbacks import JsonLog
from train.search.journal import Journal
from train.search.rule import SearchResult

__all__ = ["CONTROLLER", "publish_controller", "tune_controller"]


def tune_controller(
    scenario: Scenario, budget: Budget, seed: int, folder: RunFolder, display: Display, journal: Journal
) -> SearchResult:
    """The planner's parameters, learned on days of training arrivals.

    ``log.jsonl`` tells after every generation how much was spent, and what would have been the answer at which rate.

    :param journal: what an interrupted search knew already
    :raises SlalomError: no drift to follow, or roles that the planner cannot use
    """
    log = JsonLog(folder.root / "log.jsonl")

    def answer(used: float, rate: float, values: Values) -> None:
        if not journal.replays:
            log.write("answer", used=round(used, 4), rate=rate, values=values)

    return tune_on_days(
        RULE, scenario, seconds=budget.seconds, requests=budget.frames or float("inf"), seed=seed,
        report=display.report, journal=journal, on_answer=answer,
    )  # fmt: skip


def publish_controller(
    found: SearchResult, scenario: Scenario, config: TrainConfig, seed: int, folder: RunFolder
) -> None:
    """What the search has found, as a checkpoint in ``folder.best``."""
    table = [
        {"policy": "this controller", "score": round(found.score, 5), "split": "valid"},
        {"policy": f"{found.rule} as it is", "score": round(found.default_score, 5), "split": "valid"},
    ]
    Publisher(scenario, found, config, seed).start(folder.best, table)
