"""Lanes: where an instance's prefill and decode run, and how a device is cut in two for them.

A *lane* is a part of a device that runs one thing after the other: SMs behind a stream on a GPU (``gpu``),
cores on a CPU (``cpu``). A *partition* is a pair of disjoint lanes. Asking for one that cannot be had is an
error, never a quiet fall-back to less: a measurement always measures the mode that was asked for.

Changing the partition drains nothing. A step in flight ends where it began; the next one starts on the new lane,
which first waits for an event of the old one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

#: Index of the partition that is none: both lanes may use the whole device.
WHOLE = -1


class Lane(ABC):
    """A part of a device. Used by one thread at a time.

    :ivar size: SMs or cores that it really has
    """

    size: int

    @abstractmethod
    def open(self) -> AbstractContextManager[Any]:
        """Within it, work of the calling thread goes to this lane."""

    @abstractmethod
    def follow(self, other: Lane) -> None:
        """What is launched here from now on waits for what has been launched on ``other``; the host does not."""

    def catch_up(self) -> None:
        """What is launched here from now on waits for what was made outside of lanes: weights, an empty KV pool."""
        return

    @abstractmethod
    def wait(self) -> None:
        """Wait, on the host, for the end of what has been launched here."""

    def keep(self, *tensors: Any) -> None:
        """Tensors made on another lane are used here: their memory must outlive that use."""
        return


class Partition(NamedTuple):
    """Two lanes: disjoint, or both the whole device."""

    prefill: Lane
    decode: Lane


class Device(ABC):
    """What lanes are cut from.

    :ivar total: its SMs or cores
    """

    total: int

    @abstractmethod
    def whole(self) -> Partition:
        """Two new lanes that both may use all of it."""

    @abstractmethod
    def split(self, decode: int) -> Partition:
        """Two new disjoint lanes: ``decode`` units, and all others for prefill.

        :raises SlalomError: the device cannot be cut there
        """

    def close(self) -> None:
        """Give everything back. No lane may be in use any more."""
        return
