"""Which lanes the scheduling core means: its share rows, turned into partitions of a device."""

from __future__ import annotations

from engine.core.state import ClusterState, LaneKind, Role
from engine.errors import SlalomError
from engine.lanes import WHOLE, Device, Lanes

__all__ = ["lanes_of", "partition_of"]


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
