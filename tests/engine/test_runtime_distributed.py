"""Instances in other processes: same tokens, KV pulled over the wire, nothing lost when one is killed or stopped."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from multiprocessing import AuthenticationError, Pipe
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_cases import GREEDY, KV, MODEL, PROMPTS, TOKENIZER, FirstAllowed, cores, engine_on, mixed, send
from runtime_cases import tables
from test_graphs import Rerun
from test_lanes import CORES, needs_two_cores
from waiting import until

from engine.core.kinds import Batching, Role
from engine.core.setup import InstanceSpec, LinkSpec, SloClass
from engine.errors import SlalomError
from engine.kernels.compiled import CompiledKernels
from engine.live.engine import Engine, build_state
from engine.live.graphs import Capturer
from engine.live.hosts import LocalExecutor
from engine.model import KVPool, SamplingParams, open_checkpoint
from engine.workers import kv as kv
from engine.workers.kv import Puller, check_pipe
from engine.workers.lease import Disowned, Lease
from engine.workers.pool import Workers
from engine.workers.wire import KEY, ask, connect, fill, listen, parse_address, pour, step_from, step_message
from engine.workers.worker import Worker

LONG = replace(GREEDY, max_tokens=60)
PD = [InstanceSpec(Role.PREFILL, 0, KV), InstanceSpec(Role.DECODE, 1, KV, gpu=1, link=1)]


@pytest.fixture(scope="module", autouse=True)
def secret() -> Iterator[None]:
    before = os.environ.get(KEY)
    os.environ[KEY] = "only for these tests"
    yield
    os.environ.pop(KEY) if before is None else os.environ.update({KEY: before})


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with engine_on(mixed()) as engine:
        return [send(engine, prompt, LONG).wait().tokens for prompt in PROMPTS]


class InThread(Worker):
    """A worker in threads of this process: everything but the process is real."""

    def __init__(self, make: Callable[[], Capturer] | None = None) -> None:
        super().__init__(MODEL, TOKENIZER.eos_ids, make)
        self._listener = listen(("127.0.0.1", 0))
        self.address = self._listener.address
        threading.Thread(target=self._accept, daemon=True).start()
        atexit.register(self.close)

    def _accept(self) -> None:
        while True:
            self.welcome(self._listener.accept())

    def text(self) -> str:
        return "{}:{}".format(*self.address)


@contextmanager
def served_by(
    workers: Workers, specs: Sequence[InstanceSpec], timeout_s: float = 10.0, tables_of: Callable[[], Any] = tables
) -> Iterator[Engine]:
    checkpoint = open_checkpoint("dummy:tiny")
    workers.check(checkpoint.config, "float32")
    state = build_state(
        specs, *tables_of(), classes=[SloClass(1.0, 0.1)], links=[LinkSpec() for _ in specs], max_requests=32,
        prefix_cache=False,
    )  # fmt: skip
    engine = Engine(
        checkpoint, TOKENIZER, state, FirstAllowed(), hosts=workers.hosts(state), transport=workers.transport,
        transfer_timeout_s=timeout_s,
    ).start()  # fmt: skip
    try:
        yield engine
    finally:
        closed = engine.close(20.0)
    assert engine.failure is None
    assert closed
    assert engine.integrity_faults() == []
    assert (engine.state.pool["free"] == engine.state.pool["n_blocks"]).all()


def test_requests_migrated_over_the_wire_give_the_same_tokens(expected: list[list[int]]) -> None:
    with served_by(Workers.join([InThread().text(), InThread().text()]), PD) as engine:
        callers = [send(engine, prompt, LONG) for prompt in PROMPTS * 2]
        assert [caller.wait().tokens for caller in callers] == expected * 2
        assert engine.state.cluster[0]["n_migrated"] == len(callers)
        assert engine.instances.transfer_failures == 0


def test_workers_replay_and_one_that_cannot_capture_says_so_in_one_line(
    expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompiledKernels, "replayable", True)
    made: list[Rerun] = []

    def make(**options: int) -> Rerun:
        made.append(Rerun(**options))
        return made[-1]

    with served_by(Workers.join([InThread(make).text(), InThread(make).text()]), PD) as engine:
        callers = [send(engine, prompt, LONG) for prompt in PROMPTS]
        assert [caller.wait().tokens for caller in callers] == expected
    assert len(made) == 4, "a capturer for each lane"
    assert sum(capturer.replays > 0 for capturer in made) == 2, "prompts on one, decodes on the other"
    broken = Workers.join([InThread(lambda: make(fail=2)).text()])
    said = r"worker 127.0.0.1:\d+: got 'lane 0'.*step of 320 rows.*out of memory.*--eager"
    with pytest.raises(SlalomError, match=said), served_by(broken, [replace(PD[0], role=Role.MIXED)]):
        pass
    broken.close()


@needs_two_cores
def test_a_worker_cuts_its_device_as_the_profile_says(
    expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: set[tuple[int, int, frozenset[int]]] = set()
    run = LocalExecutor._run

    def watched(self: LocalExecutor, *args: Any) -> Any:
        bound.add((self._l, args[4], frozenset(os.sched_getaffinity(0))))
        return run(self, *args)

    monkeypatch.setattr(LocalExecutor, "_run", watched)
    specs = mixed(role=Role.MULTIPLEXED, batching=Batching.LAYERED, chunk_tokens=24, split=0)
    worker = InThread()
    for _ in range(2):  # a later owner uses the same parts
        with served_by(Workers.join([worker.text()]), specs, tables_of=cores(len(CORES))) as engine:
            first = send(engine, PROMPTS[0], LONG)
            until(lambda first=first: len(first.tokens) > 2)
            others = [send(engine, prompt, LONG) for prompt in PROMPTS[1:]]
            assert [caller.wait().tokens for caller in (first, *others)] == expected
        until(lambda: worker._lease._epoch is None, 20.0)
    assert (0, 0, frozenset(CORES[:-1])) in bound, "prefill ran on its part"
    assert (1, 0, frozenset(CORES[-1:])) in bound, "decode ran on its part"
    assert len(worker._lanes) == 1
    other = Workers.join([worker.text()])
    said, more = rf"worker 127.0.0.1:\d+: got 'lane 0'.*this device has {len(CORES)}", cores(len(CORES) + 1)
    with pytest.raises(SlalomError, match=said), served_by(other, specs, tables_of=more):
        pass
    other.close()


def test_eager_workers_are_started_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def refuse(command: list[str], **_: Any) -> Any:
        commands.append(command)
        raise OSError("not in a test")

    monkeypatch.setattr("engine.workers.pool.subprocess.Popen", refuse)
    for eager in (True, False):
        with pytest.raises(OSError, match="not in a test"):
            Workers.start(1, "dummy:tiny", "cuda", "auto", eager=eager)
    assert ["--eager" in command for command in commands] == [True, False]
    assert commands[0][commands[0].index("--device") + 1] == "cuda:0"


def test_two_instances_in_one_worker_copy_without_a_peer(expected: list[list[int]]) -> None:
    specs = [replace(spec, gpu=0) for spec in PD]
    with served_by(Workers.join([InThread().text()]), specs) as engine:
        assert send(engine, PROMPTS[5], LONG).wait().tokens == expected[5]
        assert engine.state.cluster[0]["n_migrated"] == 1


def test_drawn_tokens_and_slices_of_layers_cross_the_wire(expected: list[list[int]]) -> None:
    ends: dict[str, Any] = {"stop": ("zzz",), "stop_token_ids": (3,), "ignore_eos": True, "max_tokens": 16}
    drawn = SamplingParams(temperature=1.0, seed=7, min_p=0.1, logit_bias=((5, -1.5),), **ends)
    message = json.loads(json.dumps(step_message(None, (2, 4), [drawn], [5])))
    assert step_from(message) == (None, (2, 4), [drawn], [5])


@pytest.mark.parametrize("state", ["at the door", "while it opens", "while it sends"])
def test_a_sender_that_says_nothing_costs_a_timeout_and_the_next_pull_a_new_pair(
    state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, target = InThread(), KVPool(MODEL.config, blocks=100, block_tokens=16)
    control = connect(sender.address)
    epoch = ask(control, {"do": "own"})["epoch"]
    ask(control, {"do": "pools", "epoch": epoch, "blocks": {"0": 100}, "block_tokens": 16})
    for layer in sender._pools[0].layers:
        layer.normal_()
    stalls, hold, awoken = [True], threading.Event(), []

    def stall(real: Any) -> Any:
        def slow(*args: Any) -> Any:
            if stalls:
                stalls.pop()
                hold.wait(60.0)
                awoken.append(True)
                raise ConnectionError("too late")
            return real(*args)

        return slow

    if state == "at the door":
        monkeypatch.setattr("engine.workers.worker.serve_pulls", stall(kv.serve_pulls))
    elif state == "while it opens":
        monkeypatch.setitem(
            kv.PIPES, "wire",
            lambda connection, rank, *rest: (stall(REAL) if rank == 0 else REAL)(connection, rank, *rest),
        )  # fmt: skip
    else:
        monkeypatch.setattr(kv, "_gather", stall(kv._gather))
    puller, pairs = Puller("wire"), [(k, 99 - k) for k in range(100)]
    with pytest.raises(Exception, match=r"(?i)time|answer"):
        puller.fetch(sender.address, epoch, 0, target, pairs, 0.5)
    assert not awoken, "it waited for the sender"
    hold.set()
    assert not any(layer.any() for layer in target.layers)
    puller.fetch(sender.address, epoch, 0, target, pairs, 20.0)
    for mine, theirs in zip(target.layers, sender._pools[0].layers, strict=True):
        assert torch.equal(mine.flip(1), theirs)
    puller.close()


REAL = kv.PIPES["wire"]


def test_pulls_that_break_are_recomputed(expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    gather, left = kv._gather, [2]

    def broken(*args: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise ConnectionError("cable")
        return gather(*args)

    monkeypatch.setattr(kv, "_gather", broken)
    with served_by(Workers.join([InThread().text(), InThread().text()]), PD) as engine:
        callers = [send(engine, prompt, LONG) for prompt in PROMPTS]
        assert [caller.wait().tokens for caller in callers] == expected
        assert engine.instances.transfer_failures == 2


def test_what_cannot_be_joined_is_refused() -> None:
    worker = InThread()
    with pytest.raises(SlalomError, match="HOST:PORT"):
        parse_address("somewhere")
    with pytest.raises(SlalomError, match="cannot use it"):
        Workers.join(["127.0.0.1:1"])
    with pytest.raises(SlalomError, match="bfloat16"):
        Workers.join([worker.text()]).check(open_checkpoint("dummy:tiny").config, "bfloat16")
    with pytest.raises(SlalomError, match="kv-transport"):
        check_pipe("pigeon")
    if not torch.cuda.is_available():
        with pytest.raises(SlalomError, match="no GPU"):
            check_pipe("nccl", ["127.0.0.3", "localhost", "::1"])
    with pytest.raises(SlalomError, match="NCCL asks for no key"):
        Workers.join([worker.text(), "192.0.2.1:7001"], pipe="nccl")
    with pytest.raises(AuthenticationError):
        Client(worker.address, authkey=b"another secret")


def test_a_second_serve_is_refused_until_the_first_has_left(expected: list[list[int]]) -> None:
    workers = [InThread(), InThread()]
    names = [worker.text() for worker in workers]
    with served_by(Workers.join(names), PD) as engine:
        callers = [send(engine, prompt, LONG) for prompt in PROMPTS]
        for _ in range(20):
            with pytest.raises(SlalomError, match="another serve uses this worker"):
                Workers.join(names)
        assert [caller.wait().tokens for caller in callers] == expected
    until(lambda: not any(worker._lease._epoch for worker in workers), 20.0)
    with served_by(Workers.join(names), PD) as engine:
        assert send(engine, PROMPTS[3], LONG).wait().tokens == expected[3]


def test_who_lost_the_lease_is_not_answered_any_more(expected: list[list[int]]) -> None:
    workers = [InThread(), InThread()]
    names = [worker.text() for worker in workers]
    first = Workers.join(names)
    with served_by(first, PD) as engine:
        assert send(engine, PROMPTS[0], LONG).wait().tokens == expected[0]
        for worker in workers:
            worker._lease._heard -= 1e6  # silent for longer than any lease
        with served_by(Workers.join(names), PD) as other:
            late = send(engine, PROMPTS[1], LONG)
            assert send(other, PROMPTS[2], LONG).wait().tokens == expected[2]
            assert late.wait().finish == "unplaceable"  # both instances are lost to it
            assert late.tokens == []
            assert all(worker.lost for worker in first.workers)


def test_a_lease_runs_out_only_when_somebody_else_wants_it() -> None:
    now = [0.0]
    lease = Lease(30.0, lambda: now[0])
    mine = lease.take()
    now[0] = 29.0
    with pytest.raises(Disowned, match="29 s ago"):
        lease.take()
    lease.check(mine)
    now[0] = 100.0
    lease.check(mine)  # slow, but nobody else came
    now[0] = 131.0
    yours = lease.take()
    with pytest.raises(Disowned):
        lease.check(mine)
    with pytest.raises(Disowned):
        lease.check(None)
    assert not lease.give_back(mine)
    lease.check(yours)
    assert lease.give_back(yours)


def test_the_store_of_nccl_listens_on_loopback_only() -> None:
    store = kv._store(timedelta(seconds=5))
    tables = [path for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if path.exists()]
    lines = [line.split() for path in tables for line in path.read_text().splitlines()[1:]]
    listening = {line[1] for line in lines if line[3] == "0A"}  # TCP_LISTEN
    assert {place for place in listening if place.endswith(f":{store.port:04X}")} == {f"0100007F:{store.port:04X}"}


def test_bytes_between_messages_arrive_whole_or_time_runs_out() -> None:
    ours, theirs = Pipe()
    sent = np.random.default_rng(0).bytes(3_000_000)  # more than a socket holds
    came = bytearray(len(sent))
    taker = threading.Thread(target=lambda: (fill(theirs, memoryview(came), 20.0), theirs.send_bytes(b"next")))
    taker.start()
    pour(ours, memoryview(sent), 20.0)
    taker.join()
    assert came == sent
    assert ours.recv_bytes() == b"next"
    with pytest.raises(TimeoutError):
        pour(ours, memoryview(sent), 0.05)  # nobody takes it
    while theirs.poll(0):
        fill(theirs, memoryview(came)[:1], 1.0)
    with pytest.raises(TimeoutError):
        fill(theirs, memoryview(came), 0.05)
    ours.close()
    with pytest.raises(EOFError):
        fill(theirs, memoryview(came), 20.0)


def test_a_worker_that_closes_leaves_no_thread_behind() -> None:
    """Its peers do not have to hang up first. One that outlives the interpreter takes the process down with it."""
    before, worker, target = set(threading.enumerate()), InThread(), KVPool(MODEL.config, blocks=4, block_tokens=16)
    control, puller = connect(worker.address), Puller("wire")
    epoch = ask(control, {"do": "own"})["epoch"]
    ask(control, {"do": "pools", "epoch": epoch, "blocks": {"0": 4}, "block_tokens": 16})
    puller.fetch(worker.address, epoch, 0, target, [(0, 1)], 20.0)
    begun = set(threading.enumerate()) - before
    assert len(begun) == 3, "who accepts, who answers, and who sends"
    assert worker.close()
    assert sum(thread.is_alive() for thread in begun) == 1, "who accepts"
    puller.close()


def test_callers_that_prove_nothing_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = InThread()
    silent = [socket.create_connection(worker.address) for _ in range(80)]
    until(lambda: sum(_hung_up(line) for line in silent) >= 80 - 64, 20.0)
    for line in silent:
        line.close()
    until(lambda: worker._strangers._value == 64, 20.0)
    assert ask(connect(worker.address), {"do": "own"})["epoch"]


def _hung_up(line: socket.socket) -> bool:
    line.setblocking(False)
    try:
        return not line.recv(65536, socket.MSG_PEEK) if line.recv(1, socket.MSG_PEEK) else True
    except BlockingIOError:
        return False
    except OSError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "by"), [(0, "SIGKILL"), (1, "SIGKILL"), (1, "SIGSTOP")])
def test_a_worker_killed_or_stopped_under_load_loses_no_request(
    victim: int, by: str, expected: list[list[int]]
) -> None:
    workers = Workers.start(
        2, "dummy:tiny", "cpu", "float32", transfer_timeout_s=2.0, step_timeout_s=15.0 if by == "SIGSTOP" else 120.0
    )
    with served_by(workers, PD, timeout_s=2.0) as engine:
        callers = [send(engine, prompt, LONG) for prompt in PROMPTS]
        until(lambda: any(len(caller.tokens) > 3 for caller in callers), 90.0)
        process = workers.workers[victim].process
        assert process is not None
        process.send_signal(signal.Signals[by])
        callers += [send(engine, prompt, LONG) for prompt in PROMPTS]
        assert [caller.wait().tokens for caller in callers] == expected * 2
        assert engine.instances.lost == {victim}
        assert send(engine, PROMPTS[3], LONG).wait().tokens == expected[3]
