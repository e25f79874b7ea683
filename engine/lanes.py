"""Lanes: where an instance's prefill and decode run, and how a device is cut in two for them.

A *lane* is a part of a device that runs one thing after the other: SMs behind a stream on a GPU (``lanes_gpu``),
cores on a CPU (``lanes_cpu``). A *partition* is a pair of disjoint lanes. Asking for one that cannot be had is an
error, never a quiet fall-back to less: a measurement always measures the mode that was asked for.

Changing the partition drains nothing. A step in flight ends where it began; the next one starts on the new lane,
which first waits for an event of the old one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from engine.errors import SlalomError

__all__ = ["WHOLE", "Device", "Lane", "Lanes", "Partition", "make_device"]

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


class Lanes:
    """The partitions of one instance, by the rows of its profile's share table.

    :param sizes: units of each row, ascending; the last one is the whole device
    :raises SlalomError: the table is that of another device, or asks for a partition that cannot be had
    """

    def __init__(self, device: Device, sizes: Sequence[int]) -> None:
        if len(sizes) > 1 and sizes[-1] != device.total:
            fix = f"this device has {device.total}; use a profile of this device"
            raise SlalomError("profile: SMs or cores", int(sizes[-1]), fix)
        self.sizes = [int(size) for size in sizes]
        self.total = device.total
        self.partitions = [device.split(size) for size in self.sizes[:-1]]
        self.whole = device.whole()

    def partition(self, l: int, row: int, beside: int = WHOLE) -> int:
        """Which partition lane ``l`` (0: prefill) uses when the core gave it share ``row``.

        Decode's row names its partition. Prefill's row is the largest that fits beside decode, so several
        partitions may leave it: then that of ``beside``, decode's own row, if it is one of them.
        """
        if row >= len(self.partitions):
            return WHOLE
        if l == 1:
            return row
        fitting = [k for k in range(len(self.partitions)) if self._left_beside(k) == row]
        if beside in fitting or not fitting:
            return beside
        return fitting[-1]

    def _left_beside(self, decode_row: int) -> int:
        """Row left to prefill (:func:`engine.core.schedule.predict.prefill_share`)."""
        rest = self.sizes[-1] - self.sizes[decode_row]
        return max((k for k, size in enumerate(self.sizes) if size <= rest), default=0)

    def lane(self, l: int, partition: int) -> Lane:
        """Lane ``l`` of a partition."""
        return (self.whole if partition == WHOLE else self.partitions[partition])[l]

    def describe(self) -> list[dict[str, int]]:
        """What was asked for and what each lane really has, the whole device last."""
        rows = [*self.partitions, self.whole]
        return [
            {"asked": asked, "prefill": pair.prefill.size, "decode": pair.decode.size}
            for asked, pair in zip(self.sizes, rows, strict=True)
        ]


def make_device(kind: str, index: int = 0) -> Device:
    """The device ``cpu`` or ``cuda``.

    :raises SlalomError: another kind, or no driver
    """
    if kind == "cpu":
        from engine.lanes_cpu import CpuDevice

        return CpuDevice()
    if kind == "cuda":
        from engine.lanes_gpu import make_gpu

        return make_gpu(index)
    raise SlalomError("device", kind, "choose cpu or cuda")
