"""Lanes on a CPU: disjoint sets of cores, so that prefill and decode really run at the same time.

A lane computes with one thread however many cores it may use: with more, OpenMP's threads spin at barriers, and on
a machine with other work a step takes ten times as long. Partitions on a CPU show and test concurrency; they are no
way to make a step faster.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from engine.errors import SlalomError
from engine.lanes.base import Device, Lane, Partition

_bound = threading.local()


class CpuLane(Lane):
    """:param cores: where its thread may run; None for where the process may"""

    def __init__(self, size: int, cores: frozenset[int] | None = None) -> None:
        self.size, self.cores = size, cores

    @contextmanager
    def open(self) -> Iterator[None]:
        if getattr(_bound, "lane", None) is not self:
            if getattr(_bound, "threads", 0) != 1:
                torch.set_num_threads(1)
                _bound.threads = 1
            if self.cores is not None:
                os.sched_setaffinity(0, self.cores)  # 0: the calling thread
            _bound.lane = self
        yield

    def follow(self, other: Lane) -> None:
        return None  # a step on a CPU has ended when its call returns

    def wait(self) -> None:
        return None


class CpuDevice(Device):
    """:param cores: to cut lanes from; those the process may use if not given"""

    def __init__(self, cores: Sequence[int] | None = None) -> None:
        can_pin = hasattr(os, "sched_getaffinity")
        found = sorted(os.sched_getaffinity(0)) if can_pin else list(range(os.cpu_count() or 1))
        self._cores = list(cores) if cores is not None else found
        self._can_pin = can_pin
        if not set(self._cores) <= set(found):
            raise SlalomError("cores", self._cores, f"this process may use {found}")
        self.total = len(self._cores)

    def whole(self) -> Partition:
        cores = frozenset(self._cores) if self._can_pin else None
        return Partition(CpuLane(self.total, cores), CpuLane(self.total, cores))

    def split(self, decode: int) -> Partition:
        if not 0 < decode < self.total:
            fix = f"a partition of {self.total} cores gives each lane at least one"
            raise SlalomError("decode cores", decode, fix)
        if not self._can_pin:
            raise SlalomError("decode cores", decode, "this system cannot bind a thread to cores")
        rest = self.total - decode
        return Partition(CpuLane(rest, frozenset(self._cores[:rest])), CpuLane(decode, frozenset(self._cores[rest:])))
