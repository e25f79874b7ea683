"""Request lists: doubly linked through ``req.next`` / ``req.prev``, O(1) at both ends and in the middle.

A request is in at most one list at a time, so waiting in a queue, for a decision or for a link needs no
memory of its own. ``lists[k]`` is (head, tail, length).
"""

from __future__ import annotations

from engine.jit.kernel import kernel

PLACING = 0  # requests that wait for a PLACE_PREFILL decision
HANDOVER = 1  # ... for a PLACE_DECODE decision
HELD = 2  # a policy answered HOLD
ENDED = 3  # ended requests that a further turn of their session follows
_FIXED = 4

#: Prompts that were given up this often (REQUEST ``late``) wait behind all others of their priority, in the order in
#: which that happened: they are many when the load is above what an instance can serve, and nobody walks past them.
TWICE = 2


@kernel(forceinline=True)
def queue_of(i):
    """Prefill queue of instance ``i``."""
    return _FIXED + 3 * i


@kernel(forceinline=True)
def inbound_of(i):
    """Requests that instance ``i`` will decode once it has room to pull their KV."""
    return _FIXED + 1 + 3 * i


@kernel(forceinline=True)
def ready_of(i):
    """Requests whose KV is on instance ``i`` and that join its running set at the next step."""
    return _FIXED + 2 + 3 * i


@kernel(forceinline=True)
def link_list(n_instances, link):
    """Requests whose KV travels over ``link``, the one in transfer first."""
    return _FIXED + 3 * n_instances + link


@kernel(forceinline=True)
def push_back(lists, req, k, r):
    tail = lists[k, 1]
    req[r].prev = tail
    req[r].next = -1
    if tail >= 0:
        req[tail].next = r
    else:
        lists[k, 0] = r
    lists[k, 1] = r
    lists[k, 2] += 1


@kernel(forceinline=True)
def push_front(lists, req, k, r):
    head = lists[k, 0]
    req[r].next = head
    req[r].prev = -1
    if head >= 0:
        req[head].prev = r
    else:
        lists[k, 1] = r
    lists[k, 0] = r
    lists[k, 2] += 1


@kernel
def push_before(lists, req, k, r, other):
    """Insert ``r`` before ``other``, which is in list ``k`` (-1: at the end)."""
    if other < 0:
        push_back(lists, req, k, r)
    elif lists[k, 0] == other:
        push_front(lists, req, k, r)
    else:
        before = req[other].prev
        req[r].prev = before
        req[r].next = other
        req[before].next = r
        req[other].prev = r
        lists[k, 2] += 1


@kernel(forceinline=True)
def lets_ahead(req, longer):
    """Whether queued ``req`` lets a prompt of its priority go ahead where short ones go first, given whether it is the
    ``longer`` of the two.

    Who was given up twice lets everybody, who has answered already, or whose second deadline is near, nobody.
    """
    return req.generated == 0 and (req.late >= TWICE or (longer and req.late >= 0))


@kernel
def place_by_work(lists, req, k, r):
    """The request of queue ``k`` before which ``r`` belongs by priority, then predicted remaining prefill; -1: none.

    Requests that are computed anew (they have answered already) keep the head, and those whose second deadline is near.
    Those that were given up twice come last.
    """
    other, priority, last = lists[k, 0], req[r].priority, req[r].late >= TWICE
    while other >= 0:
        shorter = not last and lets_ahead(req[other], req[other].work > req[r].work)
        behind = req[other].priority > priority or (req[other].priority == priority and shorter)
        if behind and req[other].generated == 0:
            break
        other = req[other].next
    return other


@kernel
def push_last(lists, req, k, r):
    """Insert ``r``, which may not start before anybody of its priority, into list ``k``."""
    before = lists[k, 1]
    while before >= 0 and req[before].priority > req[r].priority:
        before = req[before].prev
    push_before(lists, req, k, r, req[before].next if before >= 0 else lists[k, 0])


@kernel(forceinline=True)
def remove(lists, req, k, r):
    before, after = req[r].prev, req[r].next
    if before >= 0:
        req[before].next = after
    else:
        lists[k, 0] = after
    if after >= 0:
        req[after].prev = before
    else:
        lists[k, 1] = before
    req[r].next = -1
    req[r].prev = -1
    lists[k, 2] -= 1


@kernel(forceinline=True)
def pop_front(lists, req, k):
    """Remove and return the first request, -1 when the list is empty."""
    r = lists[k, 0]
    if r >= 0:
        remove(lists, req, k, r)
    return r


def n_lists(n_instances: int, n_links: int) -> int:
    """Length of the ``lists`` array of a cluster."""
    return _FIXED + 3 * n_instances + n_links
