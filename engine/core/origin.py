"""Where time begins for a cluster: it moves, so that an int64 count of picoseconds never ends.

Stamps are counted from an *origin*. Before the clock has gone far enough for sums of stamps and targets to overflow,
the origin moves up to a day before the present, and every stamp of the state with it. Nobody sees it: decisions only
read differences, and what policies get as the present time (``NOW_S``) goes on, since ``cluster.origin_s`` is added.

Simulated runs do the same where they last longer than ``engine.core.ticks.LONGEST_STRETCH_S``, see
``env.surrogate.long``.
"""

from __future__ import annotations

import numpy as np

from engine.core.kinds import LaneKind, RequestState
from engine.core.state import NEVER, ClusterState
from engine.latency.evaluate import TICKS_PER_S

#: From here on the origin is moved: 13 days.
FAR = 2**60
_KEPT = 86_400 * TICKS_PER_S  # of the past, for rules that look back
#: Stamps of a request.
STAMPS = ("arrival", "placed", "prefill_start", "first_token", "last_token", "finished")
_UNIT = 1000  # ticks in a nanosecond, in which live clocks count


def shift_for(state: ClusterState, now: int) -> int:
    """By how many ticks to move the origin at ``now``: no open request gets a stamp before it, if that can be."""
    req = state.req[(state.req["state"] > RequestState.NEW) & (state.req["state"] < RequestState.FINISHED)]
    stamps = [req[name] for name in STAMPS] + [state.lane["start"][state.lane["kind"] != LaneKind.IDLE]]
    set_ = np.concatenate(stamps)
    set_ = set_[set_ >= 0]
    shift = now - _KEPT
    if len(set_):
        shift = max(min(shift, int(set_.min()) - _UNIT), now - FAR)
    return max(shift // _UNIT * _UNIT, 0)


def move_origin(state: ClusterState, shift: int, origin: int) -> None:
    """Count every stamp from ``shift`` ticks later on.

    :param origin: ticks between the first origin and the new one; may exceed 64 bits
    """
    step = min(shift, 2 * FAR)  # no stamp is that late: what is older than the origin becomes its first moment

    def moved(stamps: np.ndarray, first: int) -> np.ndarray:
        return np.where(stamps >= 0, np.maximum(stamps - step, first), stamps)

    for name in STAMPS:
        state.req[name] = moved(state.req[name], 1)
    state.lane["start"] = moved(state.lane["start"], 1)
    state.inst["last_decode_end"] = moved(state.inst["last_decode_end"], 0)
    for name in ("last_arrival", "win_start"):
        state.cluster[name] = moved(state.cluster[name], 0)
    for times in (state.due, state.watch, state.turn, state.cluster["hold_due"]):
        times[times < times.dtype.type(NEVER)] -= step
    state.cluster["origin_s"] = origin / TICKS_PER_S
