"""SLO bookkeeping: targets per request, when a request's fate is sealed, running means, token-gap histogram.

A request is good when it finished and met both targets of its class. It is *sealed* as soon as that can no
longer change: as a miss when its first token comes late, when it is shed or fails, or when its TPOT ends over
target; as good when it finishes in time.
"""

from __future__ import annotations

import numpy as np

from engine.core.kinds import RequestState
from engine.core.lists import ENDED, push_back
from engine.jit.kernel import kernel
from engine.latency.evaluate import times

#: Token gaps are counted in bins 2 % wide between 10 µs and about 3,000 s.
ITL_BINS = 1024
_ITL_LOW = 1e7  # ticks
_SMOOTH = 0.02  # weight of one request in the smoothed attainments

_FINISHED = int(RequestState.FINISHED)
_SHED = int(RequestState.SHED)


def itl_edges_s() -> np.ndarray:
    """Edges of the ITL histogram, seconds, shape (ITL_BINS + 1,); bin k holds gaps in [edge k, edge k + 1)."""
    return np.append(_EDGES, np.rint(_ITL_LOW * 1.02**ITL_BINS)) * 1e-12


#: Integer edges, so that a gap is counted in the same bin however it was arrived at.
_EDGES = np.concatenate([[0], np.rint(_ITL_LOW * 1.02 ** np.arange(1, ITL_BINS))]).astype(np.int64)


#: A float's bits without the last 46 count intervals: 64 from each power of two to the next, each narrower than a bin.
_CUT = 46
_LOW, _HIGH = (int(np.float64(x).view(np.int64)) >> _CUT for x in (_EDGES[1], 2.0**63))
#: The bin of each interval's lower end. Looked up, since a logarithm takes as long as the rest of a step's bookings.
_BIN_OF = np.searchsorted(_EDGES, (np.arange(_LOW, _HIGH + 1) << _CUT).view(np.float64), "right") - 1


@kernel
def _bin(ticks):
    if ticks < _EDGES[1]:
        return 0
    b = _BIN_OF[(np.float64(ticks).view(np.int64) >> _CUT) - _LOW]
    if b < ITL_BINS - 1 and _EDGES[b + 1] <= ticks:
        b += 1
    return b


@kernel
def record_gaps(itl, first, delta, k, n):
    """Count ``k`` token gaps of ``first``, ``first + delta``, ... ticks, each for ``n`` sequences."""
    done = 0
    gap = first
    while done < k:
        b = _bin(gap)
        count = k - done
        if delta > 0 and count > 1 and b < ITL_BINS - 1:
            count = min(count, (_EDGES[b + 1] - gap + delta - 1) // delta)
        itl[b] += count * n
        done += count
        gap += delta * count


@kernel
def seal(s, r, good):
    """Fix the fate of request ``r``: counts it once, by the weight of its class."""
    if s.req[r].sealed == 1:
        return
    s.req[r].sealed = 1
    c = s.req[r].cls
    weight = s.cls[c].weight
    s.cluster[0].sealed += 1
    if good:
        s.cls[c].good += 1
        s.cluster[0].good_weight += weight
    else:
        s.cluster[0].miss_weight += weight


@kernel
def on_first_token(s, r, now):
    """Stamp the first token of request ``r`` and judge its TTFT."""
    cluster = s.cluster[0]
    s.req[r].first_token = now
    ttft = now - s.req[r].arrival
    ok = ttft <= s.req[r].ttft_slo
    s.req[r].ttft_ok = 1 if ok else 0
    cluster.win_first += 1
    cluster.win_ttft += ttft * 1e-12
    cluster.ema_ttft_ok += _SMOOTH * ((1.0 if ok else 0.0) - cluster.ema_ttft_ok)
    if ok:
        s.cls[s.req[r].cls].ttft_ok += 1
    else:
        seal(s, r, False)


@kernel
def end_request(s, r, now, state):
    """Move request ``r`` to an end state (FINISHED, SHED or FAILED) and seal it. Its blocks must be back already."""
    cluster = s.cluster[0]
    req = s.req[r]
    req.state = state
    req.finished = now
    cluster.n_done += 1
    if req.next_turn >= 0:
        push_back(s.lists, s.req, ENDED, r)
    if state != _FINISHED:
        if state == _SHED:
            cluster.n_shed += 1
        else:
            cluster.n_failed += 1
        seal(s, r, False)
        return
    cluster.n_finished += 1
    gaps = req.generated - 1
    span = req.last_token - req.first_token
    ok = span <= times(req.tpot_slo, gaps)
    req.tpot_ok = 1 if ok else 0
    if ok:
        s.cls[req.cls].tpot_ok += 1
    seal(s, r, ok)
    cluster.ema_tpot_ok += _SMOOTH * ((1.0 if ok else 0.0) - cluster.ema_tpot_ok)
    cluster.mean_output += (req.generated - cluster.mean_output) / min(cluster.n_finished + 1, 200)
    cluster.win_finished += 1
    cluster.win_output += req.generated
    if gaps > 0:
        cluster.win_timed += 1
        cluster.win_tpot += span * 1e-12 / gaps
