"""The lanes of an instance: a device's partitions, and which of them the scheduling core's share rows mean."""

from __future__ import annotations

from collections.abc import Sequence

from engine.core.kinds import LaneKind, Role
from engine.core.state import ClusterState
from engine.errors import SlalomError
from engine.lanes.base import WHOLE, Device, Lane


def cuts_of(state: ClusterState) -> list[Cuts]:
    """How the device of every instance is cut: only for those that may ever be MULTIPLEXED."""
    may_become = state.cluster[0]["ask_realloc"] and state.cluster[0]["roles_allowed"] >> int(Role.MULTIPLEXED) & 1
    found = []
    for instance in state.inst:
        profile = int(instance["profile"])
        sizes = state.share[profile]["sms"][: int(state.profile[profile]["n_shares"])].tolist()
        found.append(Cuts(sizes if may_become or instance["role"] == Role.MULTIPLEXED else []))
    return found


def lanes_of(state: ClusterState, device: Device) -> list[Lanes]:
    """The lanes of every instance.

    :raises SlalomError: as :class:`Lanes`
    """
    found = []
    for i, cuts in enumerate(cuts_of(state)):
        try:
            found.append(Lanes(device, cuts.sizes))
        except SlalomError as error:
            raise SlalomError(f"instances[{i}]: {error.field}", error.value, error.fix) from error
    return found


def partition_of(state: ClusterState, cuts: Cuts, i: int, l: int) -> int:
    """Which partition the step in lane (i, l) runs on."""
    decode = state.lane[i, 1]
    busy = l == 0 and decode["kind"] != LaneKind.IDLE
    return cuts.partition(l, int(state.lane[i, l]["share"]), int(decode["share"]) if busy else WHOLE)


class Cuts:
    """Where the device of an instance is cut, by the rows of its profile's share table; wherever the device is.

    :param sizes: units of each row, ascending; the last one is the whole device. None: nothing is ever cut
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = [int(size) for size in sizes]

    def partition(self, l: int, row: int, beside: int = WHOLE) -> int:
        """Which partition lane ``l`` (0: prefill) uses when the core gave it share ``row``.

        Decode's row names its partition. Prefill's row is the largest that fits beside decode, so several
        partitions may leave it: then that of ``beside``, decode's own row, if it is one of them.
        """
        if row >= len(self.sizes) - 1:
            return WHOLE
        if l == 1:
            return row
        fitting = [k for k in range(len(self.sizes) - 1) if self._left_beside(k) == row]
        if beside in fitting or not fitting:
            return beside
        return fitting[-1]

    def _left_beside(self, decode_row: int) -> int:
        """Row left to prefill (:func:`engine.core.schedule.predict.prefill_share`)."""
        rest = self.sizes[-1] - self.sizes[decode_row]
        return max((k for k, size in enumerate(self.sizes) if size <= rest), default=0)


class Lanes(Cuts):
    """The partitions of one instance on its device.

    :param sizes: as of :class:`Cuts`
    :raises SlalomError: the table is that of another device, or asks for a partition that cannot be had
    """

    def __init__(self, device: Device, sizes: Sequence[int]) -> None:
        super().__init__(sizes or [device.total])
        if len(self.sizes) > 1 and self.sizes[-1] != device.total:
            fix = f"this device has {device.total}; use a profile of this device"
            raise SlalomError("profile: SMs or cores", self.sizes[-1], fix)
        self.total = device.total
        self.partitions = [device.split(size) for size in self.sizes[:-1]]
        self.whole = device.whole()

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
