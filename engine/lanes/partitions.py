"""The lanes of an instance: a device's partitions, and which of them the scheduling core's share rows mean."""

from __future__ import annotations

from collections.abc import Sequence

from engine.core.kinds import LaneKind, Role
from engine.core.state import ClusterState
from engine.errors import SlalomError
from engine.lanes.base import WHOLE, Device, Lane

__all__ = ["Lanes", "lanes_of", "make_device", "partition_of"]


def lanes_of(state: ClusterState, device: Device) -> list[Lanes]:
    """The lanes of every instance: partitions only for those that may ever be MULTIPLEXED.

    :raises SlalomError: as :class:`Lanes`
    """
    may_become = state.cluster[0]["ask_realloc"] and state.cluster[0]["roles_allowed"] >> int(Role.MULTIPLEXED) & 1
    found = []
    for i, instance in enumerate(state.inst):
        profile = int(instance["profile"])
        sizes = state.share[profile]["sms"][: int(state.profile[profile]["n_shares"])].tolist()
        if not (may_become or instance["role"] == Role.MULTIPLEXED):
            sizes = [device.total]
        try:
            found.append(Lanes(device, sizes))
        except SlalomError as error:
            raise SlalomError(f"instances[{i}]: {error.field}", error.value, error.fix) from error
    return found


def partition_of(state: ClusterState, lanes: Lanes, i: int, l: int) -> int:
    """Which partition the step in lane (i, l) runs on."""
    decode = state.lane[i, 1]
    busy = l == 0 and decode["kind"] != LaneKind.IDLE
    return lanes.partition(l, int(state.lane[i, l]["share"]), int(decode["share"]) if busy else WHOLE)


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
        from engine.lanes.cpu import CpuDevice

        return CpuDevice()
    if kind == "cuda":
        from engine.lanes.gpu import make_gpu

        return make_gpu(index)
    raise SlalomError("device", kind, "choose cpu or cuda")
