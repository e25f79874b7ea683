"""The forecast that DOPD and Dynamo publish, auto-ARIMA, from a library, for planners that ask for it by name.

``forecast=auto_arima`` fits StatsForecast's AutoARIMA (Hyndman & Khandakar 2008: stepwise search, AICc) to each
series whenever an interval ends: milliseconds to tenths of a second in the interpreter, so it is never drawn by a
search. It needs the extra ``forecast`` of this distribution; without it the choice is refused, nothing else takes
its place. The forecasts of ``policies.rules.parts.forecast`` are its autoregressive part, compiled.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import njit, objmode

from engine.core.columns import Need
from engine.core.policy import POLICY_SIGNATURE
from engine.errors import SlalomError
from policies.rule import Param, Rule
from policies.rules.parts.forecast import SERIES_CELLS
from policies.rules.parts.layout import split_layout
from policies.rules.parts.planner import AHEAD, LIBRARY, MEMORY_CELLS, PENDING, SERIES
from policies.rules.parts.profile_tables import with_tables

_LEAST_POINTS = 5


@cache
def _model() -> Any:
    """The library's model.

    :raises SlalomError: the extra is not installed
    """
    try:
        return importlib.import_module("statsforecast.models").AutoARIMA
    except ImportError:
        fix = "install the extra: pip install 'slalom[forecast]'; or use forecast=ari, last or ar1"
        raise SlalomError("forecast", LIBRARY, fix) from None


def forecast_series(values: np.ndarray) -> float:
    """Next value of a series (n,): auto-ARIMA from 5 points on, below that and for a constant the last value.

    Kept within half the least and twice the greatest value seen, like the compiled forecasts.
    """
    last, low, high = float(values[-1]), float(values.min()), float(values.max())
    if len(values) < _LEAST_POINTS or low == high:
        return last
    ahead = float(_model()(season_length=1).forecast(y=np.asarray(values, np.float64), h=1)["mean"][0])
    return min(max(ahead, 0.5 * low), 2.0 * high) if math.isfinite(ahead) else last


def _look_ahead(memory: np.ndarray) -> None:
    for i in range(3):
        at = SERIES + i * SERIES_CELLS
        memory[AHEAD + i] = forecast_series(memory[at + 1 : at + 1 + int(memory[at])])


@cache
def _with_library(decide: Callable[..., Any]) -> Any:
    """``decide`` of a planner, asked again after the interpreter has made the forecasts that it waits for."""

    # Not cached on disk, and holds the GIL: the machine code goes back into this process's interpreter.
    @njit(POLICY_SIGNATURE)
    def slow(context, candidates, mask, params, memory):
        row = decide(context, candidates, mask, params, memory)
        if memory[PENDING] == 1.0 or memory[PENDING] == 3.0:
            plan = memory[PENDING] == 1.0
            with objmode():
                _look_ahead(memory)
            memory[PENDING] = 2.0 if plan else 0.0
            if plan:
                row = decide(context, candidates, mask, params, memory)
        return row

    return slow


def _slow_decide(decide: Callable[..., Any], method: Any) -> Any:
    """What runs instead of ``decide`` for this forecast method: None but for the library's.

    :raises SlalomError: the library is wanted and not installed
    """
    if method != LIBRARY:
        return None
    _model()
    return _with_library(decide)


def planner_rule(
    name: str, decide: Callable[..., Any], own: tuple[Param, ...], layout: tuple[Param, ...], *, doc: str, source: str
) -> Rule:
    """A planner of a split fleet that forecasts its load and knows the profile.

    :param own: the parameters that ``decide`` reads, before the profile's tables; ``layout``: those of the split
    """
    return Rule(
        name=name,
        doc=doc,
        source=source,
        decide=decide,
        needs=Need.LOAD | Need.PREDICT,
        memory_size=MEMORY_CELLS,
        params=(*own, *layout),
        prepare=with_tables(own),
        slow=lambda values: _slow_decide(decide, values["forecast"]),
        arrange=split_layout(name),
    )
