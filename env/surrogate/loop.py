"""The surrogate: an event loop that drives the scheduling core with a simulated clock and a latency profile.

It is the live engine's loop (``engine.core.loop``); all it adds is *when* things end. Runs of decode steps in which
nothing can change are jumped over in closed form (exact, see ``engine.latency.evaluate``) and cut short when something
does change; with ``fast_forward`` off every step is an event, and the timelines are identical.
"""

from __future__ import annotations

import numpy as np

from engine.core.decide.decision import apply, build, next_decision
from engine.core.decide.patience import hold_event, wake_due, wake_for_idle
from engine.core.durations import step_ticks, transfer_ticks
from engine.core.events.lifecycle import arrive, book_decode
from engine.core.events.roles import end_role_change
from engine.core.events.slots import slots_of
from engine.core.kinds import LaneKind, Order, RequestState, Role
from engine.core.lists import ENDED, HELD, link_list, pop_front, queue_of
from engine.core.loop import end_interval, end_step, end_transfer, kick, next_changed
from engine.core.slo import seal
from engine.core.state import attach
from engine.jit.kernel import kernel
from engine.latency.evaluate import FOREVER, to_ticks
from env.surrogate.clock import NEVER, attach_sim, heap_pop, heap_push, set_event, span, steps_done
from env.surrogate.seen import choose_router, keep, note, open_book, show, withhold

_IDLE, _K_DECODE = int(LaneKind.IDLE), int(LaneKind.DECODE)
_MULTIPLEXED = int(Role.MULTIPLEXED)
_FINISHED = int(RequestState.FINISHED)
_FCFS = int(Order.FCFS)
_FAR = float(FOREVER)


@kernel(forceinline=True)
def _slots(s):
    return slots_of(s.cluster[0].n_instances, s.cluster[0].n_links)


@kernel
def _settle_lane(s, q, i, l, stop_next):
    """Book the decode steps of lane (i, l) that are over; ``stop_next``: let it end with the step in flight."""
    clock = q.clock[i, l]
    if s.lane[i, l].kind != _K_DECODE or clock.left <= 1:
        return
    slot = 2 * i + l
    k = steps_done(clock, q.sim[0].now, q.sim[0].slot < slot)
    if k > 0:
        end = clock.t0 + span(clock, k)
        book_decode(s, i, l, k, clock.first, clock.delta, end, True)
        clock.first += clock.delta * k
        clock.t0 = end
        clock.left -= k
    if stop_next:
        clock.left = 1
        set_event(q, slot, clock.t0 + clock.first)


@kernel
def _settle_pool(s, q, i, stop_next):
    """``_settle_lane`` for every lane that draws on the pool of instance ``i``."""
    if s.pool[s.inst[i].pool].sharers == 1:
        _settle_lane(s, q, i, 0, stop_next)
        _settle_lane(s, q, i, 1, stop_next)
        return
    for j in range(s.cluster[0].n_instances):
        if s.inst[j].pool == s.inst[i].pool:
            _settle_lane(s, q, j, 0, stop_next)
            _settle_lane(s, q, j, 1, stop_next)


@kernel
def _refresh(s, q):
    """Bring the loads that policies read up to the present."""
    for i in range(s.cluster[0].n_instances):
        for l in range(2):
            if s.lane[i, l].kind == _K_DECODE and q.clock[i, l].left > 1:
                if q.sim[0].settles == 1:
                    _settle_lane(s, q, i, l, False)
                else:
                    strict = q.sim[0].slot < 2 * i + l
                    s.inst[i].unbooked = steps_done(q.clock[i, l], q.sim[0].now, strict)


@kernel(forceinline=True)
def _start_lane(s, q, i, l):
    """Put the step that ``plan_lane`` formed on the clock."""
    lane, clock, now = s.lane[i, l], q.clock[i, l], q.sim[0].now
    profile, share = q.true_profile[i], q.true_share[i, lane.share]
    clock.t0 = now
    clock.first, clock.delta = step_ticks(profile, share, lane)
    clock.left = lane.max_steps if lane.kind == _K_DECODE and q.sim[0].fast_forward == 1 else 1
    if clock.left > 1 and s.inst[i].order != _FCFS and s.lists[queue_of(i), 2] > 0:
        # Who goes first in the queue may change at the first step boundary from ``watch`` on.
        watch = np.int64(max(min(s.watch[i], np.float64(_FAR)), np.float64(now)))
        clock.left = min(clock.left, steps_done(clock, watch, True) + 1)
    while clock.left > 1 and clock.left * (float(clock.first) + 0.5 * clock.delta * clock.left) > _FAR:
        clock.left //= 2  # no jump beyond what stamps can hold
    set_event(q, 2 * i + l, now + span(clock, clock.left))


@kernel(forceinline=True)
def _start(s, q, slot):
    """Put the end of what starts in ``slot`` on the clock."""
    slots = _slots(s)
    if slot < slots.links:
        _start_lane(s, q, slot // 2, slot % 2)
    elif slot < slots.switches:
        link = slot - slots.links
        r = s.lists[link_list(s.cluster[0].n_instances, link), 0]
        ticks = transfer_ticks(s, q.true_profile[s.req[r].dest], link, r)
        set_event(q, slot, q.sim[0].now + ticks)
    else:
        set_event(q, slot, q.sim[0].now + to_ticks(q.true_profile[slot - slots.switches].switch_s))


@kernel(forceinline=True)
def _start_idle(s, q):
    """Start whatever may start on instances where something changed; their jumps end."""
    i = next_changed(s, -1)
    while i >= 0:
        _settle_pool(s, q, i, True)
        n = kick(s, i, q.sim[0].now, q.started, 0)
        for k in range(n):
            _start(s, q, q.started[k])
        for l in range(2):
            if s.lane[i, l].kind == _IDLE:
                set_event(q, 2 * i + l, NEVER)
        i = next_changed(s, i)


@kernel(forceinline=True)
def _lane_event(s, q, i, l):
    lane, clock = s.lane[i, l], q.clock[i, l]
    if s.inst[i].role == _MULTIPLEXED or s.pool[s.inst[i].pool].sharers > 1:
        kind = lane.kind
        lane.kind = _IDLE
        _settle_pool(s, q, i, False)
        lane.kind = kind
    end_step(s, i, l, clock.left, clock.first, clock.delta, q.sim[0].now)


@kernel
def _watch_deadline(s, q, r):
    """Have request ``r`` sealed as a miss when its TTFT target passes without a first token."""
    heap_push(q.due_t, q.due_r, q.sim[0].due_n, s.req[r].arrival + s.req[r].ttft_slo + 1, r)
    q.sim[0].due_n += 1
    set_event(q, _slots(s).deadline, q.due_t[0])


@kernel
def _deadline_event(s, q):
    r = heap_pop(q.due_t, q.due_r, q.sim[0].due_n)
    q.sim[0].due_n -= 1
    if s.req[r].first_token < 0:
        seal(s, r, False)
    set_event(q, _slots(s).deadline, q.due_t[0] if q.sim[0].due_n > 0 else NEVER)


@kernel
def _next_arrival(s, q):
    """Time of the next arrival, open-loop or follow-up turn."""
    t = np.int64(NEVER)
    if q.sim[0].next_root < q.sim[0].n_roots:
        t = s.req[q.sim[0].next_root].arrival
    if q.sim[0].heap_n > 0:
        t = min(t, q.heap_t[0])
    return t


@kernel
def _arrival_event(s, q):
    now = q.sim[0].now
    if q.sim[0].heap_n > 0 and q.heap_t[0] <= now:
        r = heap_pop(q.heap_t, q.heap_r, q.sim[0].heap_n)
        q.sim[0].heap_n -= 1
    else:
        r = np.int32(q.sim[0].next_root)
        q.sim[0].next_root += 1
    arrive(s, r, now)
    if q.sim[0].beta > 0.0:
        _watch_deadline(s, q, r)
    set_event(q, _slots(s).arrival, _next_arrival(s, q))


@kernel
def _queue_follow_ups(s, q):
    """Send the next turn of each session whose last turn was answered; a refused turn ends its session."""
    while s.lists[ENDED, 2] > 0:
        r = pop_front(s.lists, s.req, ENDED)
        if s.req[r].state == _FINISHED:
            sent = s.req[r].finished + s.req[r].think
            heap_push(q.heap_t, q.heap_r, q.sim[0].heap_n, sent, s.req[r].next_turn)
            q.sim[0].heap_n += 1
    set_event(q, _slots(s).arrival, _next_arrival(s, q))


@kernel
def _credit(s, q):
    """Add what was sealed since the last look to the reward, discounted from the time of the decision."""
    good = s.cluster[0].good_weight - q.sim[0].seen_good
    missed = s.cluster[0].miss_weight - q.sim[0].seen_missed
    if good == 0.0 and missed == 0.0:
        return
    factor = np.exp(-q.sim[0].beta * 1e-12 * (q.sim[0].now - q.sim[0].asked_at))
    q.sim[0].good += factor * good
    q.sim[0].missed += factor * missed
    q.sim[0].seen_good = s.cluster[0].good_weight
    q.sim[0].seen_missed = s.cluster[0].miss_weight


@kernel(forceinline=True)
def _process(s, q, slot):
    """Carry out the event of ``slot`` at the present time."""
    slots = _slots(s)
    if slot < slots.links:
        _lane_event(s, q, slot // 2, slot % 2)
    elif slot == slots.arrival:
        _arrival_event(s, q)
    elif slot < slots.switches:
        link = slot - slots.links
        set_event(q, slot, NEVER)
        _settle_pool(s, q, s.req[s.lists[link_list(s.cluster[0].n_instances, link), 0]].inst, False)
        if end_transfer(s, link, q.sim[0].now):
            _start(s, q, slot)
    elif slot < slots.deadline:
        set_event(q, slot, NEVER)
        end_role_change(s, slot - slots.switches)
    elif slot == slots.deadline:
        _deadline_event(s, q)
    elif slot == slots.control:
        end_interval(s, q.sim[0].now)
        set_event(q, slot, q.sim[0].now + s.cluster[0].control_ticks)
    else:
        set_event(q, slot, NEVER)
        wake_due(s, q.sim[0].now)


@kernel
def _keep_until(s, q, end):
    """Keep the states of the moments up to ``end`` that somebody may still be shown."""
    every = q.sim[0].keep_ticks
    q.sim[0].keep_next = max(q.sim[0].keep_next, (end - q.sim[0].delay_ticks) // every * every)
    while q.sim[0].keep_next <= end:
        q.sim[0].now = q.sim[0].keep_next
        q.sim[0].slot = -1  # before everything that happens at that time
        _refresh(s, q)
        keep(s, q)


@kernel
def _cut(s, q):
    """The horizon is reached: book the decode steps that ended by then."""
    q.sim[0].now = s.cluster[0].horizon_ticks
    q.sim[0].slot = _slots(s).total
    for i in range(s.cluster[0].n_instances):
        _settle_lane(s, q, i, 0, False)
        _settle_lane(s, q, i, 1, False)


@kernel
def advance(s, q):
    """Run until a decision is due.

    :return: its kind (subject in ``q.sim[0].subject``), or -1 when every request has ended or the horizon is reached
    """
    slots = _slots(s)
    while True:
        kind, subject = next_decision(s, q.sim[0].now)
        if kind >= 0:
            q.sim[0].kind = kind
            q.sim[0].subject = subject
            return kind
        _start_idle(s, q)
        held = s.lists[HELD, 2] > 0
        if held and wake_for_idle(s):
            continue
        if s.lists[ENDED, 2] > 0:
            _queue_follow_ups(s, q)
        _credit(s, q)
        if held:
            set_event(q, slots.hold, hold_event(s, q.sim[0].now, q.when[slots.hold]))
        done = s.cluster[0].n_done == s.cluster[0].n_sent and q.when[slots.arrival] == NEVER
        slot = q.tree[1]
        if done or q.when[slot] > s.cluster[0].horizon_ticks:
            if not done:
                _cut(s, q)
            q.sim[0].kind = -1
            return np.int32(-1)
        if q.sim[0].delay_ticks > 0:
            _keep_until(s, q, q.when[slot])
        q.sim[0].now = q.when[slot]
        q.sim[0].slot = slot
        q.sim[0].events += 1
        _process(s, q, slot)


@kernel
def describe(s, q, needs):
    """Fill the context, candidates and mask of the decision that ``advance`` stopped at; returns their number."""
    _refresh(s, q)
    if q.sim[0].routers > 1:
        choose_router(q)
    if q.sim[0].delay_ticks > 0:
        show(s, q)
    k = build(attach(q.seen), q.sim[0].kind, q.sim[0].subject, q.sim[0].now, needs, q.context, q.candidates, q.mask)
    q.sim[0].candidates = k
    if q.sim[0].delay_ticks > 0:
        withhold(s, q)
    return k


@kernel
def answer(s, q, action):
    """Carry out ``action`` for the decision that ``advance`` stopped at."""
    if q.sim[0].delay_ticks > 0:
        note(s, q, action)
    apply(s, q.sim[0].kind, q.sim[0].subject, action, q.sim[0].now)
    q.sim[0].decisions += 1


@kernel
def run(state_words, sim_words, context, candidates, mask, decide, params, memory, needs, limit):
    """Let a compiled policy answer every decision, until the end or ``limit`` decisions (0: no limit).

    :param context: the buffers of the Sim once more, as arrays for the policy
    :param memory: the policy's; of several routers, that of the one who decided last (the others' are in the Sim)
    :return: decisions taken
    """
    s, q = attach(state_words), attach_sim(sim_words)
    taken = np.int64(0)
    while advance(s, q) >= 0:
        k = describe(s, q, needs)
        if q.sim[0].routers > 1:
            open_book(q, memory)
        action = decide(context, candidates[:k], mask[:k], params, memory)
        answer(s, q, action)
        taken += 1
        if taken == limit:
            break
    return taken
