"""What every workload kind shares: strict models, disjoint random streams per split, the ``build`` method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from engine.errors import SlalomError
from env.workload.trace import Trace

Split = Literal["train", "valid", "test"]
#: Of one run: their columns and records take some 6 GB.
MOST_REQUESTS = 20_000_000
_LEAST, _GREATEST = 1e-9, 1e12
SPLIT_NAMES: tuple[Split, ...] = ("train", "valid", "test")


class Model(BaseModel):
    """Unknown keys are errors; instances never change; numbers are such that nothing overflows or lasts for ever."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        for name, value in self:
            numbers = value if isinstance(value, tuple) else (value,)
            for x in numbers:
                if isinstance(x, int | float) and x and not _LEAST <= abs(x) <= _GREATEST:
                    raise ValueError(f"{name} must lie between {_LEAST:g} and {_GREATEST:g}, or be 0")
        return self


class WorkloadBase(Model, ABC):
    """One kind of workload; ``build`` is all the rest of Slalom knows about it."""

    @property
    def natural_s(self) -> float:
        """Seconds of an episode after which the workload has shown all it does; 0: it is alike at all times."""
        return 0.0

    def unfinished(self, rate: float, n: int) -> str:
        """What a run of ``n`` requests breaks off in the middle, in words; empty where nothing is."""
        return ""

    @abstractmethod
    def build(self, rate: float, n: int, seed: int, split: Split, classes: Sequence[str] = ()) -> Trace:
        """Draw an episode.

        :param rate: open-loop requests per second
        :param n: requests, follow-up turns included
        :param seed: the same seed and split give the same trace
        :param split: streams and windows of different splits never overlap
        :param classes: names of the scenario's SLO classes, in order, among which those of a file are looked up;
            without any they are numbered as they appear
        :raises SlalomError: a class that is none of these, the source cannot give ``n`` requests, or a file is bad
        """


def stream(seed: int, split: Split) -> np.random.Generator:
    """Random stream of (seed, split); spawn keys make the splits independent for every seed."""
    if split not in SPLIT_NAMES:
        raise SlalomError("split", split, f"give one of {', '.join(SPLIT_NAMES)}")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(SPLIT_NAMES.index(split),))))


def check_request(rate: float, n: int) -> None:
    """Refuse a rate or a count no workload can have."""
    if not (np.isfinite(rate) and rate > 0):
        raise SlalomError("rate", rate, "give requests per second > 0")
    if not 1 <= n <= MOST_REQUESTS:
        raise SlalomError("requests", n, f"give 1 to {MOST_REQUESTS} requests")
