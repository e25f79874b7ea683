"""What PPO goes on from where a checkpoint is named: its network, ready to be trained further, and its knee."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from engine.common.progress import Display
from engine.errors import SlalomError
from env.measure.contender import PointSettings
from env.measure.level import rate_unit
from env.scenario import Scenario
from env.surrogate.arena import arena_of
from policies.checkpoint.folder import LoadedPolicy, load
from policies.network.scoring import ScoringNetwork
from train.config import TrainConfig
from train.search.rule import KNEE_NEAR, SearchResult
from train.search.tune import knee_rate


def load_network(folder: Path) -> LoadedPolicy:
    """A checkpoint that can be trained further.

    :raises SlalomError: no checkpoint there, or one that is a rule
    """
    loaded = load(folder)
    if not loaded.arrays:
        fix = "it is a rule, not a network: train-policy --algo direct makes a checkpoint that can be trained further"
        raise SlalomError("--init", str(folder), fix)
    return loaded


def network_of(loaded: LoadedPolicy, hidden: int = 4, scale: float = 1.0) -> ScoringNetwork:
    """The checkpoint's network; it decides as the checkpoint does.

    :param hidden: least width where its residual is zero, as a direct search leaves it, so that there is something to
        learn with; a learned residual keeps its own
    :param scale: factor of all logits where its residual is zero: how sure a policy that draws its answers is of them
    """
    arrays, normal = loaded.arrays, loaded.manifest.normalisation
    width, untouched = len(arrays["context.bias"]), not arrays["out.weight"].any()
    factor = scale if untouched else 1.0
    network = ScoringNetwork(
        arrays["base"], hidden=max(hidden, width) if untouched else width,
        scale=float(np.exp(arrays["log_scale"][0])) * factor, normalisation=normal.constants() if normal else None,
        gate=arrays["gate"], bonus=arrays["bonus"] * factor,
    )  # fmt: skip
    if not untouched:
        network.load_state_dict({name: torch.from_numpy(a.copy()) for name, a in arrays.items()}, strict=False)
    return network


def start_from(init: Path, scenario: Scenario, config: TrainConfig, display: Display) -> SearchResult:
    """The checkpoint in the place of a search's outcome; its knee in ``scenario`` is measured.

    :raises SlalomError: see :func:`load_network`; an arrangement that ``scenario`` does not allow, or targets that the
        checkpoint meets at no rate there
    """
    begin = time.monotonic()
    loaded = load_network(init)
    loaded.bind(arena_of(scenario).setting)
    display.phase("knee")
    display.update(0.0, f"knee of {loaded.name}")
    settings = PointSettings(n_requests=config.tune_requests, split="train")
    knee = knee_rate(scenario, settings, policy=str(init), tolerance=KNEE_NEAR)
    display.update(1.0, f"{knee:.3g} {rate_unit(scenario)}")
    rule, plans, past = loaded.manifest.rule, loaded.manifest.arrangement, loaded.manifest.training
    effort = int(past.get("search_requests", 0)) + int(past.get("frames", 0))  # it counts, whoever spent it
    return SearchResult(
        rule=rule.name, values=dict(rule.values), knee=knee, default_score=0.0, score=0.0,
        trials=int(past.get("search_trials", 0)), requests=effort, seconds=round(time.monotonic() - begin, 2),
        sampler="init", plans=None if plans is None else [plan.model_dump() for plan in plans], folder=str(init),
        init=True,
    )  # fmt: skip
