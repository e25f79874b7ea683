"""A trace file named in a spec: read once, cut by time into train, validation and test."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from pydantic import Field

from engine.errors import SlalomError
from env.workload.base import SPLIT_NAMES, Model, Split
from env.workload.readers import read_trace
from env.workload.trace import Trace


class SourceSpec(Model):
    """Where a trace lies and how to read it; the fields are those of ``readers.read_trace``.

    :param path: file, ``.gz`` accepted; relative paths count from the working directory
    :param format: mooncake, azure, burstgpt, timed or slalom
    :param time_unit: s, ms, us, ns or datetime
    :param spread_s: spread equal time stamps over this many seconds (Mooncake: 3)
    :param columns: our name -> the file's name
    :param multiplier: seconds per unit of the file's times, instead of ``time_unit``
    :param hash_tokens: tokens per prefix block, where the file does not say
    :param max_context: drop longer rows, counted in ``meta``
    """

    path: str
    format: str
    time_unit: str | None = None
    spread_s: float = Field(default=0.0, ge=0)
    columns: dict[str, str] = Field(default_factory=dict)
    multiplier: float | None = Field(default=None, gt=0)
    hash_tokens: int | None = Field(default=None, gt=0, le=2**20)
    max_context: int | None = Field(default=None, ge=2)

    def load(self) -> Trace:
        """The whole file; kept in memory until it changes on disk."""
        try:
            stamp = Path(self.path).stat().st_mtime_ns
        except (OSError, ValueError) as error:
            raise SlalomError("workload.source.path", self.path, "give a file that exists") from error
        return _read(self.model_dump_json(), stamp)

    def part(self, split: Split, split_at: tuple[float, float], window: tuple[float, float] | None = None) -> Trace:
        """The split's stretch of time (of ``window``, if given), starting at 0."""
        return _cut(self.load(), split, split_at, window)


@lru_cache(maxsize=16)
def _read(dumped: str, stamp: int) -> Trace:
    spec = SourceSpec.model_validate_json(dumped)
    return read_trace(
        spec.path,
        spec.format,
        time_unit=spec.time_unit,
        spread_s=spec.spread_s,
        columns=spec.columns,
        multiplier=spec.multiplier,
        hash_tokens=spec.hash_tokens,
        max_context=spec.max_context,
    )


@lru_cache(maxsize=48)
def _cut(trace: Trace, split: Split, split_at: tuple[float, float], window: tuple[float, float] | None) -> Trace:
    if split not in SPLIT_NAMES:
        raise SlalomError("split", split, f"give one of {', '.join(SPLIT_NAMES)}")
    if not 0 < split_at[0] < split_at[1] < 1:
        raise SlalomError("workload.split_at", split_at, "give two rising shares between 0 and 1")
    t0, t1 = window or (0.0, float(np.nextafter(trace.duration_s, np.inf)))
    if not t0 < t1:
        raise SlalomError("workload.window", window, "give [t0, t1] in seconds with t0 < t1")
    cuts = [t0, t0 + split_at[0] * (t1 - t0), t0 + split_at[1] * (t1 - t0), t1]
    place = SPLIT_NAMES.index(split)
    return trace.slice_time(cuts[place], cuts[place + 1])
