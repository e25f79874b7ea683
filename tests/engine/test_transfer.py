"""KV transfers: every state ends, failures are recomputed, and blocks that a lost copy may write to stay reserved."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from live_cases import GREEDY, KV, MODEL, PROMPTS, FirstAllowed, engine_on, send
from waiting import until

from engine.core.kinds import Role
from engine.core.setup import InstanceSpec
from engine.live.transfer import CopyTransport, Mover, Transfer, TransferState
from engine.model import KVPool

SPECS = [InstanceSpec(Role.PREFILL, 0, KV), InstanceSpec(Role.DECODE, 1, KV, link=1)]


def pools() -> tuple[KVPool, KVPool]:
    generator = torch.Generator().manual_seed(0)
    made = KVPool(MODEL.config, blocks=200, block_tokens=16), KVPool(MODEL.config, blocks=200, block_tokens=16)
    for layer in made[0].layers:
        layer.normal_(generator=generator)
    return made


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with engine_on([InstanceSpec(Role.MIXED, 0, KV)]) as engine:
        callers = [send(engine, prompt) for prompt in PROMPTS]
        return [caller.wait().tokens for caller in callers]


def test_blocks_arrive_where_they_should() -> None:
    source, target = pools()
    pairs = [(k, (7 * k) % 200) for k in range(0, 200, 2)]
    transfer, done = Transfer(source, target, pairs), threading.Event()
    mover = Mover("test", CopyTransport(), lambda _: done.set())
    mover.fetch(transfer)
    assert done.wait(10)
    assert mover.stop(5.0)
    assert transfer.state == TransferState.DONE
    for mine, theirs in zip(target.layers, source.layers, strict=True):
        assert all(torch.equal(mine[:, b], theirs[:, a]) for a, b in pairs)
        assert not mine[:, 1].any()


def test_states_follow_the_diagram() -> None:
    source, target = pools()
    transfer = Transfer(source, target, [])
    assert transfer.timed_out() == TransferState.FAILED
    assert not transfer.move_to(TransferState.COPYING, only_from=(TransferState.QUEUED,))
    transfer = Transfer(source, target, [])
    assert transfer.move_to(TransferState.COPYING, only_from=(TransferState.QUEUED,))
    assert [transfer.timed_out() for _ in range(3)] == [TransferState.CANCELLING] + [TransferState.LOST] * 2


def test_a_transfer_given_up_in_the_queue_is_never_begun() -> None:
    source, target = pools()
    reports: list[Transfer] = []
    mover = Mover("test", CopyTransport(), reports.append)
    given_up, next_one = Transfer(source, target, [(0, 0)]), Transfer(source, target, [(1, 1)])
    given_up.timed_out()
    mover.fetch(given_up)
    mover.fetch(next_one)
    assert mover.stop(5.0)
    assert reports == [next_one]
    assert not target.layers[0][:, 0].any()


def test_a_cancelled_copy_stops_half_way() -> None:
    source, target = pools()
    transfer = Transfer(source, target, [(k, k) for k in range(200)])
    transfer.move_to(TransferState.COPYING, only_from=(TransferState.QUEUED,))
    transfer.timed_out()
    CopyTransport().copy(transfer)
    assert not target.layers[0].any()
    assert transfer.timed_out() == TransferState.LOST
    CopyTransport().copy(transfer)  # it looks up only now
    assert not target.layers[0].any()


class Faulty(CopyTransport):
    """Breaks or hangs where told, else copies."""

    def __init__(self) -> None:
        self.fail, self.copies = 0, 0
        self.hang = threading.Event()
        self.heed = True
        self.hung = threading.Event()

    def copy(self, transfer: Transfer) -> None:
        self.copies += 1
        if self.fail > 0:
            self.fail -= 1
            raise ConnectionError("link down")
        while self.hang.is_set() and not (self.heed and transfer.cancelled):
            self.hung.set()
            self.hang.wait(0.001)
        super().copy(transfer)


def test_failed_transfers_are_recomputed(expected: list[list[int]]) -> None:
    transport = Faulty()
    transport.fail = 2
    with engine_on(SPECS, policy=FirstAllowed(), transport=transport, prefix_cache=False) as engine:
        callers = [send(engine, prompt) for prompt in PROMPTS]
        assert [caller.wait().tokens for caller in callers] == expected
        assert engine.instances.transfer_failures == 2
        assert transport.copies == 8


def test_a_link_that_never_works_ends_in_an_error_and_not_in_a_loop() -> None:
    transport = Faulty()
    transport.fail = 10**6
    with engine_on(SPECS, policy=FirstAllowed(), transport=transport) as engine:
        assert send(engine, PROMPTS[4]).wait().finish == "error"
        assert transport.copies == 3


@pytest.mark.parametrize("heed", [True, False], ids=["cancelled", "lost"])
def test_a_hanging_copy_times_out_and_its_blocks_come_back_late(heed: bool, expected: list[list[int]]) -> None:
    transport = Faulty()
    transport.heed = heed
    transport.hang.set()
    with engine_on(
        SPECS, policy=FirstAllowed(), transport=transport, transfer_timeout_s=0.05, prefix_cache=False
    ) as engine:
        caller = send(engine, PROMPTS[4])
        assert transport.hung.wait(10)
        until(lambda: engine.instances.transfer_failures >= 1)
        if not heed:  # whatever may still be written to belongs to nobody
            sink = engine.state.pool[1]
            assert sink["n_blocks"] - sink["free"] >= 5
            threading.Timer(0.01, transport.hang.clear).start()
        else:
            transport.hang.clear()
        assert caller.wait().finish in ("length", "error")
        if caller.finish == "length":
            assert caller.tokens == expected[4]
        transport.hang.clear()
        until(lambda: bool((engine.state.pool["free"] == engine.state.pool["n_blocks"]).all()))
        assert send(engine, PROMPTS[5]).wait().tokens == expected[5]


def test_a_client_that_hangs_up_during_a_copy_frees_both_sides() -> None:
    transport = Faulty()
    transport.hang.set()
    with engine_on(SPECS, policy=FirstAllowed(), transport=transport, prefix_cache=False) as engine:
        callers = [send(engine, prompt, replace(GREEDY, max_tokens=50)) for prompt in PROMPTS]
        assert transport.hung.wait(10)
        until(lambda: int(engine.state.lists[-1, 2]) == len(PROMPTS))  # one moves, the others wait for the link
        for caller in callers:
            assert caller.request is not None
            engine.abort(caller.request)
        until(lambda: sum(caller.done.is_set() for caller in callers) == len(PROMPTS) - 1)
        transport.hang.clear()
        assert {caller.wait().finish for caller in callers} == {"abort"}
        until(lambda: bool((engine.state.pool["free"] == engine.state.pool["n_blocks"]).all()))
