"""Engines of others, which batch by themselves: what they were handed and what they were seen to do is booked.

Slalom plans no step for them. Lane 0 of such an instance stands for the prompts that it was handed and has not answered
(``prefills[i]``), with everything that predictions read: it began when the oldest of them became the engine's next, it
carries their tokens and work, and the running set beside them. So a policy sees the numbers that it would see of a
chunked instance here, and every token that comes puts them right.

Where engines hand KV over, the first token of a prompt that another engine decodes is told twice: by the engine that
computed it, which ends its leg of the walk, and by the one that goes on, whose client gets it. The latter is its time.

The entry points take the address vector of a cluster and plain numbers, as those of ``engine.core.loop`` do.
"""

from __future__ import annotations

import numpy as np

from engine.core.events.handover import hand_over, start_link, transfer_done
from engine.core.events.interrupt import detach, leave_running, start_over
from engine.core.events.lifecycle import complete_prompt, wake_held
from engine.core.kinds import LaneKind, Order, RequestState
from engine.core.kv import blocks_for, grow, publish
from engine.core.lists import link_list, queue_of
from engine.core.schedule.batching import join_ready
from engine.core.schedule.bounds import keep_bounds
from engine.core.schedule.on_time import give_up_late
from engine.core.schedule.predict import whole_device
from engine.core.schedule.preemption import note_due, recount_due
from engine.core.schedule.prompts import admit_alone, take
from engine.core.slo import end_request, on_first_token, record_gaps
from engine.core.state import NEVER as _NEVER
from engine.core.state import attach
from engine.jit.kernel import kernel
from engine.latency.evaluate import times

_IDLE, _K_PREFILL, _K_DECODE, _K_FUSED = (int(k) for k in LaneKind)
_WAITING, _PREFILLING = int(RequestState.WAITING), int(RequestState.PREFILLING)
_READY, _RUNNING = int(RequestState.READY), int(RequestState.RUNNING)
_NEW, _FINISHED, _FAILED = int(RequestState.NEW), int(RequestState.FINISHED), int(RequestState.FAILED)
_HANDOVER = int(RequestState.HANDOVER)
_FCFS, _ON_TIME = int(Order.FCFS), int(Order.ON_TIME)

#: An engine has at least so many unanswered prompts, if there are any: one that it computes, and the next.
_AHEAD = 2


@kernel
def _describe(s, i):
    """Let lane 0 say what the engine does, as far as that is known."""
    lane = s.lane[i, 0]
    lane.share = whole_device(s, i)
    lane.bs = s.inst[i].run_n
    lane.sum_ctx = s.inst[i].run_ctx
    lane.max_steps = 1
    if lane.n_prefills > 0:
        lane.kind = _K_FUSED if lane.bs > 0 else _K_PREFILL
    else:
        lane.kind = _K_DECODE if lane.bs > 0 else _IDLE
        lane.sum_n = 0
        lane.sum_n2 = 0.0
        lane.sum_nr = 0.0
        lane.work = 0


@kernel
def _keep_order(s, i, now):
    """Put the queue in order as at a step boundary: the prompts under way began before ``now``."""
    lane = s.lane[i, 0]
    begun = now
    if lane.n_prefills > 0:
        begun = now - min(now - lane.start, s.req[s.prefills[i, 0]].work)
    if s.inst[i].order == _ON_TIME:
        give_up_late(s, i, begun)
    if now >= s.watch[i]:
        keep_bounds(s, i, np.int64(s.inst[i].chunk_tokens), begun)


@kernel
def hand_on(s, i, now):
    """Give the engine of instance ``i`` the next prompts of its queue, as far as it can start them soon.

    That is: while a sequence more fits into its batch and its KV, and the prompts that it has not answered fill no more
    than a step of its token budget; one beside the one that it computes is always there, so that it never waits for us.

    :return: how many; they are the last ones in ``prefills[i]``
    """
    if s.inst[i].lost != 0:
        return 0
    join_ready(s, i)
    if s.inst[i].order != _FCFS:
        _keep_order(s, i, now)
    lane = s.lane[i, 0]
    before = lane.n_prefills
    r = s.lists[queue_of(i), 0]
    while r >= 0 and lane.n_prefills < s.inst[i].max_prefills:
        after = s.req[r].next
        if s.req[r].state == _WAITING:
            rest = s.req[r].target - s.req[r].computed
            if lane.n_prefills >= _AHEAD and lane.sum_n + rest > s.inst[i].chunk_tokens:
                break
            n = admit_alone(s, i, r, now)
            if n == 0:
                break
            if lane.n_prefills == 0:
                _describe(s, i)
                lane.start = now
            take(s, i, 0, lane.n_prefills, r, n)
        r = after
    _describe(s, i)
    return lane.n_prefills - before


@kernel
def _answered(s, i, r):
    """Take prompt ``r`` out of those that the engine of instance ``i`` has not answered."""
    lane = s.lane[i, 0]
    kept = 0
    for k in range(lane.n_prefills):
        other = s.prefills[i, k]
        if other != r:
            s.prefills[i, kept] = other
            kept += 1
    lane.n_prefills = kept
    n = s.req[r].sched
    lane.sum_n -= n
    lane.sum_n2 -= float(n) * float(n)
    lane.sum_nr -= float(n) * float(s.req[r].computed)
    lane.work -= s.req[r].work


@kernel
def _first_token(s, r, now):
    i = s.req[r].inst
    _answered(s, i, r)
    queued = s.lists[queue_of(i), 2]
    complete_prompt(s, i, r, now)
    # Every prompt that is through makes room for one that was held.
    wake_held(s, queued - s.lists[queue_of(i), 2])
    join_ready(s, i)
    s.lane[i, 0].start = now
    _describe(s, i)
    s.inst[i].dirty = 1


@kernel
def _stays(s, r, now):
    """The engine that answered request ``r`` goes on with it, whoever might be asked."""
    if s.req[r].state == _HANDOVER:
        i = s.req[r].inst
        hand_over(s, r, i, now)
        join_ready(s, i)
        _describe(s, i)


@kernel
def book_first_token(words, r, now):
    """The first token of request ``r`` that the engine gave since it was handed the prompt came at ``now``."""
    s = attach(words)
    if s.req[r].state == _PREFILLING:
        _first_token(s, r, now)
        _stays(s, r, now)


@kernel
def book_prefilled(words, r, now):
    """The engine has computed the prompt of request ``r`` and keeps its KV for whoever will decode it.

    Its first token is judged when its client gets it (:func:`book_delivered`); until then it is due from now on.
    """
    s = attach(words)
    if s.req[r].state != _PREFILLING:
        return
    fresh = s.req[r].first_token < 0
    if fresh:
        s.req[r].first_token = now
        s.req[r].last_token = now
    _first_token(s, r, now)
    if fresh:
        record_gaps(s.itl, 0, 0, 1, -1)  # there was none


@kernel
def book_moved(words, link, now):
    """The request at the head of ``link`` goes on where it moves to; returns whether another one moves there too."""
    s = attach(words)
    r = s.lists[link_list(s.cluster[0].n_instances, link), 0]
    if r < 0:
        return False
    i = s.req[r].dest
    transfer_done(s, link, now)
    join_ready(s, i)
    _describe(s, i)
    return start_link(s, link)


@kernel
def book_delivered(words, r, now):
    """The first token of request ``r``, whose prompt another engine may have computed, came at ``now``."""
    s = attach(words)
    if s.req[r].state != _RUNNING:
        return
    on_first_token(s, r, now)
    s.req[r].last_token = now
    recount_due(s, s.req[r].inst)


@kernel
def forget_tokens(words, r):
    """Nobody got the tokens of request ``r``: all will be computed anew. A first one that was in time is judged anew.

    To be followed by :func:`take_back`, or by another first token.
    """
    s = attach(words)
    req = s.req[r]
    s.cluster[0].tokens_out -= req.generated
    req.generated = 0
    req.first_token = -1
    req.last_token = -1
    if req.ttft_ok == 1:
        s.cls[req.cls].ttft_ok -= 1
        req.ttft_ok = -1


@kernel
def _move_due(s, i, r, before):
    """Request ``r`` has more tokens than ``before``: the least due time of its class may be later."""
    c = s.req[r].cls
    if s.req[r].first_token + times(s.req[r].tpot_slo, before) > s.due[i, c]:
        return
    s.due[i, c] = _NEVER
    for slot in range(s.inst[i].run_n):
        other = s.run[i, slot]
        if s.req[other].cls == c:
            note_due(s, i, other)


@kernel
def book_tokens(words, r, n, now):
    """``n`` further tokens of request ``r`` came at ``now``.

    Its KV grows as far as the books have blocks: an engine that has more of them than it said is not held up.
    """
    s = attach(words)
    req = s.req[r]
    if req.state != _RUNNING or n <= 0:
        return
    i, size = req.inst, s.cluster[0].block_tokens
    p = s.inst[i].pool
    gap = max(now - req.last_token, 0)
    record_gaps(s.itl, gap, 0, 1, 1)
    record_gaps(s.itl, 0, 0, n - 1, 1)
    before, generated = req.computed, req.generated
    req.generated += n
    req.computed = before + n
    req.last_token = max(now, req.last_token)
    need = min(blocks_for(req.computed, size), req.blocks + s.pool[p].free)
    if need > req.blocks:
        req.tail = grow(s, p, req.tail, req.blocks, need)
        req.blocks = need
    if req.hash_n > 0 and need == blocks_for(req.computed, size):
        publish(s, p, r, before, req.computed)
    s.inst[i].run_ctx += n
    s.inst[i].last_decode_end = req.last_token
    s.cluster[0].tokens_out += n
    _move_due(s, i, r, generated)
    _describe(s, i)


@kernel
def book_end(words, r, generated, now):
    """The answer of request ``r`` ended at ``now`` with ``generated`` tokens in all, by the engine's own count."""
    s = attach(words)
    req = s.req[r]
    if req.state == _PREFILLING:
        _first_token(s, r, now)
        _stays(s, r, now)
    i = req.inst
    if req.state == _RUNNING:
        leave_running(s, i, r)
    elif req.state == _READY:
        detach(s, r)
    else:
        return
    s.cluster[0].tokens_out += generated - req.generated
    req.generated = generated
    end_request(s, r, now, _FINISHED)
    _describe(s, i)
    s.inst[i].dirty = 1


@kernel
def take_back(words, r, now, again):
    """Request ``r`` is with no engine any more: its client hung up, or the engine refused it or is gone.

    :param again: 1: it is placed anew; 0: it ends as FAILED
    """
    s = attach(words)
    req = s.req[r]
    if req.state == _NEW or req.state >= _FINISHED:
        return
    i = req.inst
    if req.state == _RUNNING:
        leave_running(s, i, r)
    else:
        if req.state == _PREFILLING:
            _answered(s, i, r)
            if s.lane[i, 0].n_prefills > 0:
                s.lane[i, 0].start = max(s.lane[i, 0].start, now)
            req.sched = 0
            req.state = _WAITING
        detach(s, r)
    if i >= 0:
        _describe(s, i)
        s.inst[i].dirty = 1
    if again == 1:
        start_over(s, r)
    else:
        end_request(s, r, now, _FAILED)


@kernel
def set_away(words, i, away):
    """The engine of instance ``i`` does not answer (``away`` 1) or does again (0); who waits there is not moved."""
    s = attach(words)
    s.inst[i].lost = 2 if away == 1 else 0
    s.inst[i].dirty = 1
