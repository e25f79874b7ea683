"""Which checkpoint leaves the training: the base or a snapshot, on validation windows nobody saw yet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.common.progress import Display
from env.measure.contender import Contender
from train.config import TrainConfig
from train.export import Publisher
from train.folder import RunFolder
from train.ppo.callbacks import Evaluation
from train.ppo.judge import Judge, Verdict

_FIRST_SEED = 3_000  # away from the search's and the monitored windows


def select(
    evaluations: Sequence[Evaluation],
    publisher: Publisher,
    config: TrainConfig,
    folder: RunFolder,
    judge: Judge,
    display: Display,
) -> dict[str, Any]:
    """Judge the base and the best snapshots again on fresh windows; write the winner to ``best/``.

    The windows watched in training chose the snapshots, so their scores are too good; these are not.

    :returns: the table, the winner and its gain over the base with the standard error over windows
    """
    display.phase("select")
    finalists = sorted(evaluations, key=lambda e: -e.score)[: config.finalists]
    seeds = range(_FIRST_SEED, _FIRST_SEED + config.final_seeds)
    contenders: list[tuple[str, Contender]] = [("base", publisher.base.contender)]
    for entry in finalists:
        contenders.append((entry.name, Contender(str(folder.root / "snapshots" / entry.name))))
    verdicts: list[Verdict] = []
    for index, (name, contender) in enumerate(contenders):
        display.update(index / len(contenders), name)
        verdicts.append(judge.submit(contender, seeds).result())
    display.update(1.0, "done")
    # ties go to the simpler policy, the base, which comes first
    winner = max(range(len(contenders)), key=lambda i: verdicts[i].score)
    per_window = np.mean(np.array(verdicts[winner].levels) - np.array(verdicts[0].levels), axis=0)
    error = float(np.std(per_window, ddof=1) / np.sqrt(len(per_window))) if len(per_window) > 1 else 0.0
    table = [
        {"policy": name, "score": round(verdict.score, 5), "windows": len(seeds), "split": "valid"}
        for (name, _), verdict in zip(contenders, verdicts, strict=True)
    ]
    if winner == 0:
        publisher.start(folder.best, table)
    else:
        publisher.finished(Path(contenders[winner][1].policy), folder.best, table)
    return {
        "winner": contenders[winner][0],
        "score": verdicts[winner].score,
        "base_score": verdicts[0].score,
        "gain": float(np.mean(per_window)),
        "gain_standard_error": error,
        "table": table,
    }
