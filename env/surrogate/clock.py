"""The simulated clock: what each lane is doing, and which event of the cluster comes next.

Every source of events (a lane, a link, a role switch, the arrivals, ...) has a fixed slot with the time of its next
event; a tournament over the slots finds the earliest, the lower slot on a tie, in a handful of comparisons.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.core.columns import N_CANDIDATE, N_CONTEXT, max_candidates
from engine.core.events.slots import slots_of
from engine.core.state import REQUEST, ClusterState, attach
from engine.jit.kernel import kernel
from engine.jit.rows import addresses, make_attach
from engine.latency.evaluate import PROFILE, SHARE, to_ticks
from env.surrogate.seen import BOOKING, PARTS, RING, Seen, copies

NEVER = np.iinfo(np.int64).max

CLOCK = np.dtype(
    [
        ("t0", np.int64),  # start of the first step not yet booked
        ("first", np.int64),  # its duration
        ("delta", np.int64),  # each further step takes this much longer
        ("left", np.int64),  # steps until the lane's next event
    ],
    align=True,
)


SIM = np.dtype(
    [
        ("now", np.int64),
        ("slot", np.int64),  # event slot being processed
        ("n_roots", np.int64),
        ("next_root", np.int64),
        ("heap_n", np.int64),
        ("due_n", np.int64),
        ("fast_forward", np.int32),
        ("settles", np.int32),  # 1: steps that are over are booked at every look, not only counted
        ("kind", np.int32),  # the decision being asked, -1 none
        ("subject", np.int32),
        ("candidates", np.int32),
        ("size", np.int32),  # leaves of the tournament
        ("decisions", np.int64),
        ("events", np.int64),
        # -- reward of the current decision interval, discounted to the time of the decision
        ("beta", np.float64),
        ("asked_at", np.int64),
        ("good", np.float64),
        ("missed", np.float64),
        ("seen_good", np.float64),
        ("seen_missed", np.float64),
        # -- what routers know, see env.surrogate.seen
        ("routers", np.int32),
        ("router", np.int32),  # whose the decision being asked is
        ("book_of", np.int32),  # whose memory the policy has at hand
        ("delay_ticks", np.int64),  # 0: everything, at once
        ("keep_ticks", np.int64),  # between two states kept
        ("keep_next", np.int64),  # when the next one is
        ("booked_n", np.int64),  # bookings ever made
        ("book_size", np.int64),
    ],
    align=True,
)


class Sim(NamedTuple):
    """Clock and event queue of one simulated cluster."""

    sim: np.ndarray  # SIM (1,)
    clock: np.ndarray  # CLOCK (N, 2)
    when: np.ndarray  # int64 (slots,): time of the next event of each slot
    tree: np.ndarray  # int32 (2 · size,): tournament over ``when``; tree[1] is the earliest slot
    started: np.ndarray  # int32 (4,): slots of what has just started on one instance
    heap_t: np.ndarray  # int64 (R,): follow-up turns by arrival
    heap_r: np.ndarray  # int32 (R,)
    due_t: np.ndarray  # int64 (R,): requests by TTFT deadline, kept when rewards are asked for (beta > 0)
    due_r: np.ndarray  # int32 (R,)
    true_profile: np.ndarray  # PROFILE (N,): what steps really take, per instance
    true_share: np.ndarray  # SHARE (N, M)
    context: np.ndarray  # float64 (N_CONTEXT,)
    candidates: np.ndarray  # float64 (K, N_CANDIDATE)
    mask: np.ndarray  # uint8 (K,)
    seen: np.ndarray  # int64: address vector of what who decides knows; without delay, of the cluster itself
    kept: np.ndarray  # int64 (RING, ·): address vectors of earlier states
    booking: np.ndarray  # BOOKING: the newest decisions of all routers
    booked: np.ndarray  # REQUEST: their requests, as they were before
    books: np.ndarray  # float64 (routers, ·): what the policy of each remembers, but that of ``book_of``
    store: np.ndarray  # uint8: what the address vectors point to


#: The simulated clock behind an address vector, for use inside kernels.
attach_sim = make_attach(
    "Sim",
    [
        ("sim", SIM, 1),
        ("clock", CLOCK, 2),
        ("when", np.int64, 1),
        ("tree", np.int32, 1),
        ("started", np.int32, 1),
        ("heap_t", np.int64, 1),
        ("heap_r", np.int32, 1),
        ("due_t", np.int64, 1),
        ("due_r", np.int32, 1),
        ("true_profile", PROFILE, 1),
        ("true_share", SHARE, 2),
        ("context", np.float64, 1),
        ("candidates", np.float64, 2),
        ("mask", np.uint8, 1),
        ("seen", np.int64, 1),
        ("kept", np.int64, 2),
        ("booking", BOOKING, 1),
        ("booked", REQUEST, 1),
        ("books", np.float64, 2),
        ("store", np.uint8, 2),
    ],
)


def new_sim(
    state: ClusterState,
    *,
    n_roots: int,
    fast_forward: bool = True,
    beta: float = 0.0,
    true_profile: np.ndarray | None = None,
    true_share: np.ndarray | None = None,
    seen: Seen = Seen(),
    cells: int = 0,
) -> Sim:
    """A clock at time zero for ``state``, whose first ``n_roots`` requests arrive at their ``arrival`` stamps.

    :param beta: discount rate of rewards, 1/s
    :param true_profile: PROFILE (N,) and SHARE (N, M) the world runs on; the nominal ones if not given
    :param seen: what those who decide know of the cluster
    :param cells: of the policy's memory, which every router has for itself
    """
    n, links = len(state.inst), len(state.link)
    slots = slots_of(n, links).total
    due = max(len(state.req) if beta > 0 else 0, 1)
    size = 1 << (slots - 1).bit_length()
    sim = np.zeros(1, SIM)
    sim["n_roots"], sim["fast_forward"], sim["beta"] = n_roots, fast_forward, beta
    # A prefix cache changes with every block that is filled. And where requests bring TPOT targets of their own, what
    # a step leaves of the least slack is not told by their classes.
    sim["settles"] = state.cluster[0]["hash_tokens"] > 0 or (state.req["tpot_slo"] > 0).any()
    sim["kind"], sim["size"] = -1, size
    late = seen.delay_s > 0
    store, words = copies(state, RING + 1 if late else 0)
    books = 2 * len(state.req) if late else 1  # every request is placed, and handed over
    sim["routers"], sim["delay_ticks"], sim["book_size"] = seen.routers, to_ticks(seen.delay_s), books
    sim["keep_ticks"] = max(to_ticks(seen.delay_s / PARTS), 1)
    rows, own = state.inst["profile"], addresses(state)
    k = max_candidates(n)
    result = Sim(
        sim=sim,
        clock=np.zeros((n, 2), CLOCK),
        when=np.full(slots, NEVER, np.int64),
        tree=np.zeros(2 * size, np.int32),
        started=np.zeros(4, np.int32),
        heap_t=np.zeros(max(len(state.req) - n_roots, 1), np.int64),
        heap_r=np.zeros(max(len(state.req) - n_roots, 1), np.int32),
        due_t=np.zeros(due, np.int64),
        due_r=np.zeros(due, np.int32),
        true_profile=state.profile[rows] if true_profile is None else true_profile,
        true_share=state.share[rows] if true_share is None else true_share,
        context=np.zeros(N_CONTEXT),
        candidates=np.zeros((k, N_CANDIDATE)),
        mask=np.zeros(k, np.uint8),
        seen=words[RING] if late else own,
        kept=words[:RING],
        booking=np.zeros(books, BOOKING),
        booked=np.zeros(books, REQUEST),
        books=np.zeros((seen.routers, cells if seen.routers > 1 else 0)),
        store=store,
    )
    start(own, addresses(result))
    return result


@kernel(forceinline=True)
def _earlier(when, a, b):
    """The slot with the earlier event; the lower slot on a tie. -1 stands for a slot that does not exist."""
    if a < 0:
        return b
    if b < 0:
        return a
    if when[b] < when[a] or (when[b] == when[a] and b < a):
        return b
    return a


@kernel
def set_event(q, slot, t):
    """Move the event of ``slot`` to time ``t``."""
    if q.when[slot] == t:
        return
    q.when[slot] = t
    k = (q.sim[0].size + slot) // 2
    while k >= 1:
        before = q.tree[k]
        now = _earlier(q.when, q.tree[2 * k], q.tree[2 * k + 1])
        q.tree[k] = now
        if now == before and now != slot:
            break
        k //= 2


@kernel
def start(state_words, sim_words):
    """Lay out the event queue of a new clock."""
    s, q = attach(state_words), attach_sim(sim_words)
    size = q.sim[0].size
    n = s.cluster[0].n_instances
    slots = slots_of(n, s.cluster[0].n_links)
    for k in range(slots.total):
        q.when[k] = NEVER
    q.when[slots.control] = s.cluster[0].control_ticks
    if q.sim[0].n_roots > 0:
        q.when[slots.arrival] = s.req[0].arrival
    for k in range(size):
        q.tree[size + k] = k if k < slots.total else -1
    for k in range(size - 1, 0, -1):
        q.tree[k] = _earlier(q.when, q.tree[2 * k], q.tree[2 * k + 1])
    for i in range(n):
        s.inst[i].dirty = 1


@kernel(forceinline=True)
def span(clock, k):
    """Ticks that the next ``k`` steps of a lane take."""
    return clock.first * k + clock.delta * (k * (k - 1) // 2)


@kernel
def steps_done(clock, now, strict):
    """Steps of a lane that ended by ``now`` (``strict``: before it)."""
    if clock.left <= 1:
        return np.int64(0)
    room = now - clock.t0 - (1 if strict else 0)
    if room < clock.first:
        return np.int64(0)
    if clock.delta == 0:
        return min(room // clock.first, clock.left - 1)
    a = 0.5 * clock.delta
    b = clock.first - a
    k = np.int64((np.sqrt(b * b + 4.0 * a * room) - b) / (2.0 * a))
    k = min(max(k, np.int64(0)), clock.left - 1)
    while k > 0 and span(clock, k) > room:
        k -= 1
    while k < clock.left - 1 and span(clock, k + 1) <= room:
        k += 1
    return k


@kernel
def heap_push(heap_t, heap_r, n, t, r):
    """Add (t, r) to a binary heap of ``n`` entries; earliest first, lowest request on a tie."""
    k = n
    while k > 0:
        up = (k - 1) // 2
        if heap_t[up] < t or (heap_t[up] == t and heap_r[up] < r):
            break
        heap_t[k] = heap_t[up]
        heap_r[k] = heap_r[up]
        k = up
    heap_t[k] = t
    heap_r[k] = r


@kernel
def heap_pop(heap_t, heap_r, n):
    """Remove the first of the ``n`` entries of a heap and return its request."""
    result = heap_r[0]
    n -= 1
    t, r = heap_t[n], heap_r[n]
    k = 0
    while 2 * k + 1 < n:
        c = 2 * k + 1
        if c + 1 < n and (heap_t[c + 1] < heap_t[c] or (heap_t[c + 1] == heap_t[c] and heap_r[c + 1] < heap_r[c])):
            c += 1
        if t < heap_t[c] or (t == heap_t[c] and r < heap_r[c]):
            break
        heap_t[k] = heap_t[c]
        heap_r[k] = heap_r[c]
        k = c
    heap_t[k] = t
    heap_r[k] = r
    return result
