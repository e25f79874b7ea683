"""What a router knows where states reach it late, and where others place requests beside it.

``Seen`` says how late, and how many routers share the arrivals (each request belongs to one of them, drawn at random).
While the run goes on the state of the instances is *kept* at fixed moments, ``PARTS`` of them in a delay. A router
that decides is shown the newest state kept that is as old as the delay, or older by less than a ``PARTS``-th of it;
into that it books, in order and with the core's own functions, what it placed itself since. What others placed it sees
no sooner than the delay. Roles, splits and budgets are known at once (who commands them tells everybody), as is what a
prefix cache holds. Control decisions are the first router's.

Without a delay a router is shown the state itself: the same columns from the same place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.core.columns import Kind
from engine.core.decide.patience import is_idle
from engine.core.events.lifecycle import place
from engine.core.kinds import RequestState
from engine.core.kv import mixed
from engine.core.lists import PLACING, inbound_of, link_list, push_back, queue_of, ready_of
from engine.core.state import ClusterState, attach
from engine.jit.kernel import kernel
from engine.jit.rows import WORDS, addresses, copy_rows

#: States kept in one delay.
PARTS = 4
#: ... and at any time: those that some router may still be shown, and the one being taken.
RING = PARTS + 2

_RING = RING
_PLACE_PREFILL, _PLACE_DECODE = int(Kind.PLACE_PREFILL), int(Kind.PLACE_DECODE)
_PLACING = int(RequestState.PLACING)

BOOKING = np.dtype(
    [
        ("time", np.int64),
        ("request", np.int32),
        ("inst", np.int32),
        ("router", np.int32),
        ("kind", np.int32),
    ],
    align=True,
)


@dataclass(frozen=True)
class Seen:
    """What those who decide know of the cluster.

    :param delay_s: states of instances are known so many seconds late
    :param routers: who share the arrivals; each has its own policy's memory
    """

    delay_s: float = 0.0
    routers: int = 1


#: What a router is shown a copy of; it reads everything else where it stands.
_COPIED = ("cluster", "inst", "lane", "lists", "due", "watch", "req")


def copies(state: ClusterState, n: int) -> tuple[np.ndarray, np.ndarray]:
    """``n`` clusters that share with ``state`` all that is not copied.

    :return: one array that holds what is, uint8, to be kept alive; and the address vectors, int64 (n, ·)
    """
    own = [getattr(state, name) for name in _COPIED]
    ends = np.cumsum([0] + [-(-array.nbytes // 64) * 64 for array in own])
    store = np.zeros((n, int(ends[-1])), np.uint8)
    words = []
    for k in range(n):
        parts = {
            name: store[k, begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
            for name, array, begin in zip(_COPIED, own, ends[:-1], strict=True)
        }
        words.append(addresses(state._replace(**parts)))
    return store, np.array(words, np.int64).reshape(n, WORDS * len(state))


@kernel
def choose_router(q):
    """Whose the decision asked now is: a router's drawn by the request's hash, the first router's otherwise."""
    router = np.int32(0)
    if q.sim[0].kind <= _PLACE_DECODE:
        router = np.int32(mixed(np.uint64(0), q.sim[0].subject) % np.uint64(q.sim[0].routers))
    q.sim[0].router = router


@kernel
def open_book(q, memory):
    """Put into ``memory`` what the policy of the router that decides remembers, and what was there where it belongs."""
    before, now = q.sim[0].book_of, q.sim[0].router
    if before == now:
        return
    for k in range(memory.shape[0]):
        q.books[before, k] = memory[k]
        memory[k] = q.books[now, k]
    q.sim[0].book_of = now


@kernel
def _copy(s, seen):
    """Copy what changes from cluster ``s`` to ``seen``; of the requests, those that wait for their prefill."""
    n = s.cluster[0].n_instances
    copy_rows(seen.cluster, 0, s.cluster, 0, 1)
    copy_rows(seen.inst, 0, s.inst, 0, n)
    copy_rows(seen.lane, 0, s.lane, 0, n)
    copy_rows(seen.due, 0, s.due, 0, n)
    copy_rows(seen.watch, 0, s.watch, 0, n)
    copy_rows(seen.lists, 0, s.lists, 0, link_list(n, s.cluster[0].n_links))
    for i in range(n):
        r = s.lists[queue_of(i), 0]
        while r >= 0:
            copy_rows(seen.req, r, s.req, r, 1)
            r = s.req[r].next


@kernel
def keep(s, q):
    """Keep the state of this moment, a multiple of the interval between two."""
    _copy(s, attach(q.kept[(q.sim[0].now // q.sim[0].keep_ticks) % _RING]))
    q.sim[0].keep_next += q.sim[0].keep_ticks


@kernel
def _as_commanded(s, seen, i):
    """What instance ``i`` was told to be is known at once."""
    to, of = seen.inst[i], s.inst[i]
    to.role, to.target_role, to.switching, to.lost = of.role, of.target_role, of.switching, of.lost
    to.batching, to.split, to.chunk_tokens = of.batching, of.split, of.chunk_tokens
    seen.cluster[0].moving_roles = s.cluster[0].moving_roles


@kernel
def _book(q, seen, k):
    """Enter booking ``k``, which the kept state does not know yet."""
    note = q.booking[k]
    r, i = note.request, note.inst
    if note.kind == _PLACE_DECODE:
        tokens = q.booked[k].computed
        if seen.inst[q.booked[k].inst].pool == seen.inst[i].pool:
            seen.inst[i].held_tokens += tokens
            seen.lists[ready_of(i), 2] += 1
        else:
            seen.inst[i].inbound_tokens += tokens
            seen.lists[inbound_of(i), 2] += 1
    elif q.booked[k].first_inst < 0:
        copy_rows(seen.req, r, q.booked, k, 1)
        seen.req[r].state = _PLACING
        push_back(seen.lists, seen.req, PLACING, r)
        place(seen, r, i, note.time)
    else:
        # Placed once more after a role change: where it waited before, the kept state may still have it in a queue.
        seen.inst[i].queue_tokens += q.booked[k].target
        seen.inst[i].queue_work += q.booked[k].work


@kernel
def show(s, q):
    """Make ``q.seen`` what the router that decides now knows: an old state, and its own bookings since."""
    seen, now, every = attach(q.seen), q.sim[0].now, q.sim[0].keep_ticks
    at = max(now - q.sim[0].delay_ticks, 0) // every
    then = at * every
    _copy(attach(q.kept[at % _RING]), seen)
    for i in range(s.cluster[0].n_instances):
        _as_commanded(s, seen, i)
    size = q.sim[0].book_size
    first = q.sim[0].booked_n
    while first > 0 and first > q.sim[0].booked_n - size and q.booking[(first - 1) % size].time >= then:
        first -= 1
    for k in range(first, q.sim[0].booked_n):
        if q.booking[k % size].router == q.sim[0].router:
            _book(q, seen, k % size)
    r = q.sim[0].subject
    if q.sim[0].kind <= _PLACE_DECODE:
        before, after = seen.req[r].prev, seen.req[r].next  # it may stand in a queue of the kept state
        copy_rows(seen.req, r, s.req, r, 1)
        seen.req[r].prev, seen.req[r].next = before, after
    seen.cluster[0].lag = now - then


@kernel
def note(s, q, action):
    """Enter the answer to the decision asked now, not yet carried out, into the router's book."""
    if q.sim[0].kind > _PLACE_DECODE or action >= s.cluster[0].n_instances:
        return
    k = q.sim[0].booked_n % q.sim[0].book_size
    booking = q.booking[k]
    booking.time, booking.request, booking.inst = q.sim[0].now, q.sim[0].subject, action
    booking.router, booking.kind = q.sim[0].router, q.sim[0].kind
    copy_rows(q.booked, k, s.req, q.sim[0].subject, 1)
    q.sim[0].booked_n += 1


@kernel
def withhold(s, q):
    """Offer neither HOLD nor SHED while an instance that may take the request is idle, known or not: it asks for work,
    and would ask again at once."""
    n = s.cluster[0].n_instances
    if q.sim[0].kind != _PLACE_PREFILL:
        return
    for i in range(n):
        if q.mask[i] == 1 and is_idle(s, i):
            q.mask[n], q.mask[n + 1] = 0, 0
