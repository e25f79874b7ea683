"""Engines of others in the core: whatever is seen of them, in whatever order, the books agree with a recount."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from audit import recount
from runtime_cases import tables

from engine.core import loop
from engine.core.columns import N_CANDIDATE, N_CONTEXT, Col, max_candidates
from engine.core.events import interrupt, observed
from engine.core.kinds import LaneKind, Order, RequestState, Role
from engine.core.setup import ClusterOptions, InstanceSpec, LinkSpec, SloClass, blank_requests
from engine.jit.rows import addresses
from engine.latency.evaluate import TICKS_PER_S
from engine.live.engine import build_state
from engine.live.integrity import faults

S = RequestState
CHUNK, BATCH = 256, 5
PARTED = (Role.PREFILL, Role.DECODE, Role.MIXED)


class Desk:
    """A cluster of remote instances, driven by hand."""

    def __init__(
        self,
        n: int = 2,
        *,
        slots: int = 40,
        kv_tokens: int = 65_536,
        apart: bool = False,
        roles: tuple[Role, ...] = (Role.MIXED,),
        **spec: Any,
    ) -> None:
        profile, share = tables()
        one = {"chunk_tokens": CHUNK, "max_batch": BATCH, "watermark": 0.0, "remote": True} | spec
        specs = [InstanceSpec(Role.MIXED, i, kv_tokens, **one) for i in range(n)]
        options = ClusterOptions(hold=True, roles=roles, place_decode=apart, at_once=2)
        classes = [SloClass(1.0, 0.1), SloClass(5.0, 0.2)]
        self.state = build_state(
            specs, profile, share, classes=classes, options=options, max_requests=slots, prefix_cache=False,
            links=[LinkSpec() for _ in specs],
        )  # fmt: skip
        self.words, self.now = addresses(self.state), 0
        self.rows = (
            np.zeros(N_CONTEXT),
            np.zeros((max_candidates(n), N_CANDIDATE)),
            np.zeros(max_candidates(n), np.uint8),
        )
        self.started = np.zeros(4 * n, np.int32)

    def arrive(self, r: int, prompt: int, cls: int = 0) -> None:
        self.state.req[r : r + 1] = blank_requests(1)
        self.state.req[r]["prompt"], self.state.req[r]["output"] = prompt, 2**31 - 1
        self.state.req[r]["cls"] = cls
        loop.begin(self.words, r, self.now)

    def settle(self, choose: Any = None) -> list[int]:
        """Answer what is asked and start what may start; returns the instances that were handed something."""
        context, candidates, mask = self.rows
        while True:
            kind, subject, k = loop.ask(self.words, self.now, 7, context, candidates, mask)
            if kind < 0:
                break
            allowed = np.flatnonzero(mask[:k])
            action = int(allowed[0] if choose is None else choose(allowed))
            loop.answer(self.words, kind, subject, action, self.now)
        started = self.started[: loop.start_idle(self.words, self.now, self.started)].tolist()
        lanes = 2 * len(self.state.inst)
        for slot in started:
            while slot >= lanes and observed.book_moved(self.words, slot - lanes, self.now):
                pass
        return [slot // 2 for slot in started if slot < lanes]

    def at(self, i: int) -> list[int]:
        """Prompts that engine ``i`` has not answered."""
        return self.state.prefills[i, : self.state.lane[i, 0]["n_prefills"]].tolist()  # type: ignore[no-any-return]

    def in_state(self, *states: int) -> list[int]:
        return np.flatnonzero(np.isin(self.state.req["state"], states)).tolist()  # type: ignore[no-any-return]


def one_handed_over() -> Desk:
    """Engines that prefill and decode apart, the first of which has been handed a prompt of 100 tokens."""
    desk = Desk(apart=True)
    desk.arrive(0, 100)
    desk.settle(lambda allowed: 0)
    return desk


def settle_somehow(desk: Desk, dice: random.Random) -> None:
    """Answer what is asked at random, after the clock's own events now and then; the books must agree."""
    desk.settle(lambda allowed: dice.choice(list(allowed)))
    if dice.random() < 0.3:
        loop.wake(desk.words, desk.now)
        desk.settle(lambda allowed: dice.choice(list(allowed)))
    recount(desk.state)


def test_an_engine_gets_what_it_can_start_soon_and_the_rest_waits_here() -> None:
    desk = Desk(1)
    for r in range(6):
        desk.arrive(r, 100)
    assert desk.settle() == [0]
    assert desk.at(0) == [0, 1]  # two fill more than a step has room for with a third: 300 > 256
    desk.now += 1000
    observed.book_first_token(desk.words, 0, desk.now)
    assert desk.settle() == [0]
    assert desk.at(0) == [1, 2]
    assert desk.in_state(S.RUNNING) == [0]
    recount(desk.state)


def test_long_prompts_go_two_at_a_time_and_seats_are_kept() -> None:
    desk = Desk(1)
    for r in range(8):
        desk.arrive(r, 1000)
    desk.settle()
    assert desk.at(0) == [0, 1]
    for r in range(8):
        desk.now += 1000
        if r < BATCH:
            observed.book_first_token(desk.words, r, desk.now)
            desk.settle()
    assert desk.at(0) == []  # every seat is taken
    assert desk.in_state(S.RUNNING) == list(range(BATCH))
    observed.book_end(desk.words, 0, 17, desk.now)
    desk.settle()
    assert desk.at(0) == [5]
    assert desk.state.req[0]["generated"] == 17
    recount(desk.state)


def test_predictions_see_the_prompts_under_way_and_the_time_that_passed() -> None:
    desk = Desk(2)
    context, candidates, mask = desk.rows

    def wait_s() -> float:
        kind, _, _ = loop.ask(desk.words, desk.now, 7, context, candidates, mask)
        assert kind == 0
        return float(candidates[0, int(Col.WAIT_S)])

    desk.arrive(0, 200)
    desk.settle(lambda allowed: 0)
    desk.arrive(1, 200)
    at_once = wait_s()
    own = float(candidates[1, int(Col.PREFILL_S)])
    assert at_once == pytest.approx(own, rel=1e-6)
    desk.now += int(0.25 * own * TICKS_PER_S)
    assert wait_s() == pytest.approx(0.75 * own, rel=1e-3)
    observed.book_first_token(desk.words, 0, desk.now)
    assert wait_s() < 0.5 * own  # half a decode step


def test_an_engine_that_is_late_still_has_the_prompts_behind_the_first() -> None:
    desk = Desk(1)
    context, candidates, mask = desk.rows
    for r in range(2):
        desk.arrive(r, 100)
    desk.settle()
    desk.arrive(2, 100)
    loop.ask(desk.words, desk.now, 7, context, candidates, mask)
    at_once = float(candidates[0, int(Col.WAIT_S)])
    desk.now += 100 * TICKS_PER_S  # much longer than both were to take
    loop.ask(desk.words, desk.now, 7, context, candidates, mask)
    assert float(candidates[0, int(Col.WAIT_S)]) == pytest.approx(0.5 * at_once, rel=1e-6)


@pytest.mark.parametrize("order", [Order.FCFS, Order.SHORTEST, Order.ON_TIME])
def test_the_books_agree_with_a_recount_after_everything_that_can_be_seen(order: Order) -> None:
    desk, dice = Desk(3, order=order), random.Random(int(order))
    handed = set[int]()
    for _ in range(500):
        desk.now += dice.randrange(1, TICKS_PER_S // 50)
        free = [r for r in desk.in_state(S.NEW, S.FINISHED, S.FAILED) if r not in handed]
        sent, running = desk.in_state(S.PREFILLING), desk.in_state(S.RUNNING)
        what = dice.random()
        if what < 0.3 and free:
            desk.arrive(free[0], dice.choice([1, 15, 16, 200, 257, 900]), dice.randrange(2))
        elif what < 0.5 and sent:
            observed.book_first_token(desk.words, dice.choice(sent), desk.now)
        elif what < 0.75 and running:
            observed.book_tokens(desk.words, dice.choice(running), dice.randrange(1, 5), desk.now)
        elif what < 0.85 and sent + running:
            observed.book_end(desk.words, dice.choice(sent + running), dice.randrange(1, 60), desk.now)
        elif what < 0.95:
            open_ = desk.in_state(*(x for x in S if S.NEW < x < S.FINISHED))
            if open_:
                observed.take_back(desk.words, dice.choice(open_), desk.now, dice.randrange(2))
        else:
            observed.set_away(desk.words, dice.randrange(3), dice.randrange(2))
        settle_somehow(desk, dice)
    for r in desk.in_state(*(x for x in S if S.NEW < x < S.FINISHED)):
        observed.take_back(desk.words, r, desk.now, 0)
    assert (desk.state.lane["kind"] == LaneKind.IDLE).all()
    assert faults(desk.state) == []


def test_a_prompt_that_moves_is_judged_when_its_client_gets_the_first_token() -> None:
    desk = one_handed_over()
    assert int(desk.state.req[0]["arrival"]) == 0
    desk.now = TICKS_PER_S // 2
    observed.book_prefilled(desk.words, 0, desk.now)
    assert desk.in_state(S.HANDOVER) == [0]
    desk.settle(lambda allowed: 1)
    assert (desk.in_state(S.RUNNING), int(desk.state.req[0]["inst"])) == ([0], 1)
    assert desk.state.cluster[0]["win_first"] == 0
    recount(desk.state)
    desk.now = 2 * TICKS_PER_S  # its target is one second
    observed.book_delivered(desk.words, 0, desk.now)
    assert int(desk.state.req[0]["first_token"]) == desk.now
    assert (desk.state.cluster[0]["win_first"], desk.state.req[0]["ttft_ok"]) == (1, 0)
    assert int(desk.state.itl.sum()) == 0
    observed.book_tokens(desk.words, 0, 2, desk.now + 5)
    assert (int(desk.state.req[0]["generated"]), int(desk.state.itl.sum())) == (3, 2)
    recount(desk.state)


def test_a_prompt_whose_kv_is_lost_begins_anew() -> None:
    desk = one_handed_over()
    observed.book_prefilled(desk.words, 0, 5)
    desk.settle(lambda allowed: 1)
    observed.forget_tokens(desk.words, 0)
    observed.take_back(desk.words, 0, 7, 1)
    assert desk.in_state(S.PLACING) == [0]
    assert (int(desk.state.req[0]["target"]), int(desk.state.cluster[0]["tokens_out"])) == (100, 0)
    recount(desk.state)
    desk.settle(lambda allowed: 0)
    observed.book_first_token(desk.words, 0, 9)  # in one piece now: it stays
    assert (desk.in_state(S.RUNNING), int(desk.state.req[0]["inst"])) == ([0], 0)
    recount(desk.state)


def test_who_is_away_is_not_asked_to_decode() -> None:
    desk = one_handed_over()
    observed.set_away(desk.words, 0, 1)
    observed.book_prefilled(desk.words, 0, 5)
    asked: list[list[int]] = []
    desk.settle(lambda allowed: asked.append(list(allowed)) or allowed[0])
    assert asked == [[1]]


def test_an_engine_that_is_to_prefill_only_gives_its_answers_first() -> None:
    desk = Desk(apart=True, roles=PARTED)
    for r in range(3):
        desk.arrive(r, 100)
    desk.settle(lambda allowed: 0)
    assert desk.at(0) == [0, 1]
    assert interrupt.request_role(desk.words, 0, int(Role.PREFILL))
    asked: list[list[int]] = []
    desk.settle(lambda allowed: asked.append(list(allowed)) or allowed[0])
    assert asked[0] == [1]  # the one that it has not been handed goes elsewhere
    assert int(desk.state.req[2]["inst"]) == 1
    observed.book_first_token(desk.words, 0, 1000)
    observed.book_prefilled(desk.words, 1, 1000)
    desk.settle()
    assert (int(desk.state.req[1]["inst"]), desk.at(0)) == (1, [])
    assert (desk.state.inst["role"][0], desk.state.cluster[0]["moving_roles"]) == (Role.MIXED, 1)
    observed.book_end(desk.words, 0, 5, 2000)
    desk.settle()
    assert (desk.state.inst["role"][0], desk.state.cluster[0]["moving_roles"]) == (Role.PREFILL, 0)
    assert int(desk.state.cluster[0]["n_switches"]) == 1
    recount(desk.state)


def test_an_engine_that_is_to_decode_only_keeps_its_answers_and_waits_for_prompts_alone() -> None:
    desk = Desk(apart=True, roles=PARTED)
    for r in range(2):
        desk.arrive(r, 100)
    desk.settle(lambda allowed: 0)
    observed.book_first_token(desk.words, 0, 1000)
    assert interrupt.request_role(desk.words, 0, int(Role.DECODE))
    desk.settle()
    assert desk.state.inst["role"][0] == Role.MIXED
    observed.book_first_token(desk.words, 1, 2000)
    desk.settle()
    assert desk.state.inst["role"][0] == Role.DECODE
    assert desk.in_state(S.RUNNING) == [0, 1]
    recount(desk.state)


def test_engines_that_do_not_answer_count_for_nobody_s_minimum() -> None:
    desk = Desk(apart=True, roles=PARTED)
    observed.set_away(desk.words, 1, 1)
    assert not interrupt.request_role(desk.words, 0, int(Role.DECODE))
    assert not interrupt.request_role(desk.words, 1, int(Role.DECODE))
    observed.set_away(desk.words, 1, 0)
    assert interrupt.request_role(desk.words, 0, int(Role.DECODE))


def test_the_books_agree_with_a_recount_while_prompts_move_and_roles_change() -> None:
    desk, dice = Desk(3, apart=True, kv_tokens=4096, roles=PARTED), random.Random(3)
    moving: set[int] = set()
    for _ in range(500):
        desk.now += dice.randrange(1, TICKS_PER_S // 50)
        free, sent = desk.in_state(S.NEW, S.FINISHED, S.FAILED), desk.in_state(S.PREFILLING)
        running, open_ = desk.in_state(S.RUNNING), desk.in_state(*(x for x in S if S.NEW < x < S.FINISHED))
        moving &= set(open_)
        what = dice.random()
        if what < 0.3 and free:
            desk.arrive(free[0], dice.choice([1, 15, 16, 200, 257, 900]), dice.randrange(2))
        elif what < 0.5 and sent:
            r = dice.choice(sent)
            moving.add(r)
            observed.book_prefilled(desk.words, r, desk.now)
        elif what < 0.55 and sent:
            observed.book_first_token(desk.words, dice.choice(sent), desk.now)
        elif what < 0.75 and running:
            r = dice.choice(running)
            if r in moving:
                observed.book_delivered(desk.words, r, desk.now)
                moving.remove(r)
            observed.book_tokens(desk.words, r, dice.randrange(1, 5), desk.now)
        elif what < 0.85 and running:
            observed.book_end(desk.words, dice.choice(running), dice.randrange(1, 60), desk.now)
        elif what < 0.95 and open_:
            r = dice.choice(open_)
            if r in moving:
                observed.forget_tokens(desk.words, r)
                moving.remove(r)
            observed.take_back(desk.words, r, desk.now, dice.randrange(2))
        elif what < 0.98:
            interrupt.request_role(desk.words, dice.randrange(3), dice.randrange(3))
        else:
            observed.set_away(desk.words, dice.randrange(3), dice.randrange(2))
        settle_somehow(desk, dice)
    assert int(desk.state.cluster[0]["n_migrated"]) > 5
    assert int(desk.state.cluster[0]["n_switches"]) > 3


def test_an_engine_with_more_kv_than_it_said_goes_on() -> None:
    desk = Desk(1, kv_tokens=64)
    desk.arrive(0, 40)
    desk.settle()
    observed.book_first_token(desk.words, 0, 1000)
    for k in range(60):
        observed.book_tokens(desk.words, 0, 1, 2000 + k)
    assert desk.state.req[0]["generated"] == 61
    assert desk.state.pool[0]["free"] == 0
    desk.arrive(1, 10)
    assert desk.settle() == []
    observed.book_end(desk.words, 0, 61, 5000)
    assert desk.settle() == [0]
    observed.book_end(desk.words, 1, 1, 6000)
    assert faults(desk.state) == []


def test_while_no_engine_answers_requests_are_held_and_nobody_fails() -> None:
    desk = Desk(2)
    observed.set_away(desk.words, 0, 1)
    observed.set_away(desk.words, 1, 1)
    desk.arrive(0, 10)
    assert desk.settle() == []
    assert desk.in_state(S.HELD) == [0]
    desk.now += TICKS_PER_S // 10
    loop.wake(desk.words, desk.now)
    desk.settle()
    assert desk.in_state(S.HELD) == [0]
    observed.set_away(desk.words, 1, 0)
    loop.wake(desk.words, desk.now)
    assert desk.settle() == [1]
    recount(desk.state)
