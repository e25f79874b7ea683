"""Instances that die under load, and memory that runs out: nothing is lost, tokens stay the same, blocks balance."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from live_cases import GREEDY, KV, PROMPTS, Ends, FirstAllowed, engine_on, mixed, send
from waiting import until

from engine.core.kinds import Batching, Role
from engine.core.setup import ClusterOptions, InstanceSpec
from engine.errors import SlalomError
from engine.live.door import Unavailable
from engine.live.transfer import CopyTransport, Transfer, TransferState
from engine.model import ModelRunner

LONG = replace(GREEDY, max_tokens=60)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with engine_on(mixed()) as engine:
        return [send(engine, prompt, LONG).wait().tokens for prompt in PROMPTS]


class Killer:
    """Ends the thread of a lane in the middle of a step."""

    def __init__(self) -> None:
        self.victims: set[str] = set()
        self.struck = threading.Event()

    def strike(self, *lanes: str) -> None:
        self.victims |= set(lanes)


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Killer]:
    it, run_layers = Killer(), ModelRunner.run_layers

    def run(self: ModelRunner, *args: Any) -> Any:
        name = threading.current_thread().name
        if name in it.victims:
            it.struck.set()
            raise SystemExit
        return run_layers(self, *args)

    monkeypatch.setattr(ModelRunner, "run_layers", run)
    return it


CASES: dict[str, tuple[list[InstanceSpec], str]] = {
    "one of two mixed": (mixed(2), "instance-0-lane-0"),
    "on a shared pool": (mixed(2, pool=0), "instance-0-lane-0"),
    "the only prefill": (
        [InstanceSpec(Role.PREFILL, 0, KV), InstanceSpec(Role.DECODE, 1, KV, link=1)], "instance-0-lane-0",
    ),
    "the only decode": (
        [InstanceSpec(Role.PREFILL, 0, KV), InstanceSpec(Role.DECODE, 1, KV, link=1)], "instance-1-lane-1",
    ),
    "between slices of layers": (
        [*mixed(role=Role.MULTIPLEXED, batching=Batching.LAYERED), *mixed(1, pool=1, link=1)], "instance-0-lane-1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_a_dead_instance_had_is_computed_by_the_others(
    case: str, killer: Killer, expected: list[list[int]]
) -> None:
    specs, victim = CASES[case]
    with engine_on(specs, policy=FirstAllowed(), prefix_cache=False) as engine:
        callers = [send(engine, prompt, LONG) for prompt in PROMPTS]
        until(lambda: any(len(caller.tokens) > 2 for caller in callers))
        killer.strike(victim)
        callers += [send(engine, prompt, LONG) for prompt in PROMPTS]
        assert killer.struck.wait(20)
        assert [caller.wait().tokens for caller in callers] == expected * 2
        assert engine.accepting
        assert len(engine.instances.lost) == 1
        (dead,) = engine.instances.lost
        with pytest.raises(SlalomError, match="role"):
            engine.set_role(dead, Role.MIXED)
        assert send(engine, PROMPTS[4], LONG).wait().tokens == expected[4]
        assert (engine.state.pool["free"] == engine.state.pool["n_blocks"]).all()


def test_without_any_instance_left_everybody_hears_so(killer: Killer) -> None:
    with engine_on(mixed(2), prefix_cache=False) as engine:
        callers = [send(engine, prompt, replace(LONG, max_tokens=1000)) for prompt in PROMPTS]
        until(lambda: any(caller.tokens for caller in callers))
        killer.strike("instance-0-lane-0", "instance-1-lane-0")
        assert {caller.wait().finish for caller in callers} == {"unplaceable"}
        assert not engine.accepting
        with pytest.raises(Unavailable, match="every instance"):
            send(engine, PROMPTS[0])


def test_an_instance_that_dies_while_it_changes_its_role_blocks_no_other_change(killer: Killer) -> None:
    with engine_on(mixed(3), policy=FirstAllowed()) as engine:
        callers = [send(engine, prompt, LONG) for prompt in PROMPTS]
        until(lambda: any(caller.tokens for caller in callers))
        engine.set_role(0, Role.PREFILL)
        killer.strike("instance-0-lane-0")
        for caller in callers:
            assert caller.wait().finish == "length"
        until(lambda: 0 in engine.instances.lost or int(engine.state.inst[0]["role"]) == Role.PREFILL)
        engine.set_role(1, Role.DECODE)
        until(lambda: int(engine.state.inst[1]["role"]) == Role.DECODE)


class Stuck(CopyTransport):
    """Copies nothing until told, whatever anybody says."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.seen: list[Transfer] = []

    def copy(self, transfer: Transfer) -> None:
        self.seen.append(transfer)
        self.free.wait(30)
        super().copy(transfer)


def test_a_transfer_that_waits_behind_a_lost_one_times_out_in_the_queue(expected: list[list[int]]) -> None:
    transport = Stuck()
    specs = [InstanceSpec(Role.PREFILL, 0, KV), *mixed(2, pool=1, link=1)[:1], *mixed(1, pool=2, link=2)]
    with engine_on(
        specs, policy=FirstAllowed(), transport=transport, transfer_timeout_s=0.05, prefix_cache=False
    ) as engine:
        callers = [send(engine, prompt, LONG) for prompt in PROMPTS[:2]]
        until(lambda: engine.instances.transfer_failures >= 3)  # one is lost, the others never left the queue
        assert len(transport.seen) == 1
        assert transport.seen[0].state == TransferState.LOST
        transport.free.set()
        assert {caller.wait().finish for caller in callers} <= {"length", "error"}
        until(lambda: engine.n_open == 0)
        assert send(engine, PROMPTS[2], LONG).wait().tokens == expected[2]
        until(lambda: bool((engine.state.pool["free"] == engine.state.pool["n_blocks"]).all()))


def test_full_memories_on_both_sides_of_a_link_lose_nothing(expected: list[list[int]]) -> None:
    specs = [InstanceSpec(Role.PREFILL, 0, 288), InstanceSpec(Role.DECODE, 1, 288, link=1)]
    with engine_on(specs, options=ClusterOptions(hold=True, hold_s=0.005), prefix_cache=False) as engine:
        callers = [send(engine, prompt, LONG) for prompt in PROMPTS * 3]
        assert [caller.wait().tokens for caller in callers] == expected * 3
        assert int(engine.state.cluster[0]["n_preempted"]) > 0


def test_prompts_start_by_priority(expected: list[list[int]]) -> None:
    with engine_on(mixed(max_batch=1), prefix_cache=False) as engine:
        order: list[int] = []
        engine.observers.append(Ends(lambda request, record, finish: order.append(request.priority)))
        first = send(engine, PROMPTS[5], LONG)
        until(lambda: bool(first.tokens))
        callers = [send(engine, PROMPTS[k], LONG, priority=p) for k, p in enumerate((5, 0, -3, 5, 1))]
        assert [caller.wait().tokens for caller in callers] == expected[:5]
        until(lambda: len(order) == 6)
    assert order == [0, -3, 0, 1, 5, 5]
    with engine_on(mixed()) as engine, pytest.raises(SlalomError, match="priority"):
        send(engine, PROMPTS[0], priority=2**40)
