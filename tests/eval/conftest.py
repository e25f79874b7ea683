"""Fixtures of the evaluation tests."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from eval_cases import Scenario, synthetic_measure

from engine.core.slo import ITL_BINS
from engine.core.state import CLUSTER, REQUEST
from env.measure.contender import PointSettings
from env.measure.evaluator import Evaluator


@pytest.fixture
def make_run():
    def make(rows, duration_ms=1000.0, class_names=("only",), itl=None, n_gpus=2):
        req = np.zeros(len(rows), dtype=REQUEST)
        for i, row in enumerate(rows):
            for name, value in row.items():
                req[i][name] = value
        return SimpleNamespace(
            req=req,
            cluster=np.zeros(1, dtype=CLUSTER)[0],
            itl=np.zeros(ITL_BINS, dtype=np.int64) if itl is None else itl,
            class_names=list(class_names),
            n_gpus=n_gpus,
            duration_s=duration_ms / 1000,
            wall_s=0.1,
            decisions=len(rows),
            rate=5.0,
            seed=0,
        )

    return make


@pytest.fixture
def scenario():
    return Scenario()


@pytest.fixture
def evaluator(scenario):
    with Evaluator(scenario, PointSettings(n_requests=2_000), measure=synthetic_measure) as made:
        yield made
