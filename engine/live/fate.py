"""What became of a request, measured by its targets: one verdict for metrics, dashboard and decision log."""

from __future__ import annotations

import secrets
from typing import NamedTuple

import numpy as np

from engine.core.kinds import RequestState
from engine.latency.evaluate import times

#: Of this process: with a request's number it makes an id that no other process, earlier or later, gives.
SERVER = secrets.token_hex(4)

#: Ends of a request beside the model's own (:class:`engine.model.Finish`).
ABORT = "abort"  # the client is gone, or the engine shut down
ERROR = "error"  # a step or its transfers failed
SHED = "shed"  # the policy refused it
UNPLACEABLE = "unplaceable"  # no instance could ever hold it
#: Why a request is not even taken in.
OVERLOADED = "overloaded"  # every slot is taken
DRAINING = "draining"  # an operator wants it so
UNAVAILABLE = "unavailable"  # every instance is lost, or the engine failed


class Fate(NamedTuple):
    """Which targets a request met; ``good`` is None where nobody can say."""

    ttft: bool
    tpot: bool
    good: bool | None


def fate_of(record: np.void, finish: str) -> Fate:
    """Of a request that ended; ``record`` is its REQUEST record.

    Sent and not served is missed. A client that left is the exception: what it had seen by then counts. Where it had
    waited too long it left a miss behind, else nobody knows what would have been.
    """
    if finish != ABORT:
        done = bool(record["state"] == RequestState.FINISHED)
        ttft, tpot = bool(record["ttft_ok"] == 1), done and bool(record["tpot_ok"] == 1)
        return Fate(ttft, tpot, done and ttft and tpot)
    first, left, gaps = int(record["first_token"]), int(record["finished"]), int(record["generated"]) - 1
    if first < 0:
        in_time = left - int(record["arrival"]) <= int(record["ttft_slo"])
        return Fate(False, False, None if in_time else False)
    ttft = bool(record["ttft_ok"] == 1)
    tpot = bool(int(record["last_token"]) - first <= times(int(record["tpot_slo"]), max(gaps, 0)))
    return Fate(ttft, tpot, None if ttft and tpot else False)


def fate_of_refused(reason: str) -> Fate:
    """Of a request that was not taken in: a miss, unless an operator sends clients elsewhere."""
    return Fate(False, False, None if reason == DRAINING else False)
