"""Instances that compute: a thread a lane, a thread a link, and the book of requests that they serve."""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from engine.core import loop
from engine.core.events import interrupt
from engine.core.kinds import LaneKind, RequestState
from engine.core.setup import blank_requests
from engine.core.state import NEVER, ClusterState
from engine.latency.evaluate import to_ticks
from engine.live.clock import WallClock
from engine.live.door import TurnedAway
from engine.live.hosts import Host, InstanceLost
from engine.live.request import ERROR, SHED, UNPLACEABLE, Delta, Request
from engine.live.runtime import Runtime
from engine.live.steps import LaneRunner, Step, StepResult
from engine.live.transfer import Mover, Transfer, TransferState, Transport

__all__ = ["LiveInstances"]

_log = logging.getLogger("slalom.instance")
#: A request whose KV could not be moved this often ends with an error.
_MOST_TRANSFER_FAILURES = 3


def _nobody(delta: Delta) -> None:
    """The sink of a request that has ended."""


class _Lane:
    """A thread that runs the steps of one lane and reports their results."""

    def __init__(self, name: str, runner: LaneRunner, report: Callable[[StepResult], None]) -> None:
        self.runner = runner
        self._report = report
        self._inbox: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def run(self, step: Step) -> None:
        self._inbox.put(step)

    def stop(self, timeout_s: float) -> bool:
        self._inbox.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (step := self._inbox.get()) is not None:
            try:
                result = self.runner.run(step)
            except BaseException as error:  # this thread ends; whoever waits for it must hear so
                self._report(StepResult([], InstanceLost(f"the thread of the lane ended: {error!r}")))
                return
            self._report(result)


class LiveInstances:
    """Everything of a cluster that computes or copies. All methods but :meth:`stop` belong to the loop's thread.

    :param hosts: one for each instance; those of instances on one pool have the same
    :param salt: of the prefix hashes
    :param timeout_s: a transfer may take in each of its states
    """

    def __init__(
        self,
        state: ClusterState,
        clock: WallClock,
        hosts: Sequence[Host],
        transport: Transport,
        *,
        salt: int,
        timeout_s: float = 10.0,
    ) -> None:
        self._state, self._clock = state, clock
        self._hosts, self._pools = hosts, [host.pool for host in hosts]
        slots = len(state.req)
        self.requests: list[Request | None] = [None] * slots
        self._free = list(range(slots - 1, -1, -1))
        self._blank = blank_requests(1)
        self._hash_room = len(state.hashes) // slots
        self._salt, self._hash_tokens = np.uint64(salt), int(state.cluster[0]["hash_tokens"])
        self._hashed = state.req["hash_n"]  # a view: how many prefix hashes each request has
        self._n_done = state.cluster["n_done"]  # a view, too: reading a record takes several times as long
        self._width = max(int(p["n_blocks"]) for p in state.pool)
        self._steps: list[Step | None] = [None] * (2 * len(hosts))  # in flight, by lane
        self._lanes = [self._lane(i, l, host) for i, host in enumerate(hosts) for l in range(2)]
        self._movers = [
            Mover(f"link-{k}", transport, partial(clock.post, 2 * len(hosts) + k)) for k in range(len(state.link))
        ]
        self._timeout = to_ticks(timeout_s)
        self._moving: dict[int, tuple[Transfer, int]] = {}  # by link: what is on it, and whose KV (slot)
        self._quarantine: dict[Transfer, tuple[int, int, int]] = {}  # lost ones: instance, last block, blocks
        self._doomed: set[Request] = set()
        self.lost: set[int] = set()  # instances whose thread or process is gone
        self._deltas: list[tuple[Request, Delta]] = []
        self._seen_done = 0
        self.transfer_failures = 0
        self.closing = False
        self.after_step: Callable[[], None] = lambda: None
        self.on_gone: Callable[[], None] = lambda: None  # a request has heard its last
        self.on_refused: Callable[[TurnedAway], None] = lambda request: None  # somebody was not even taken in
        self.on_first: Callable[[Request, np.void], None] = lambda request, record: None  # its first token is out
        self.on_end: Callable[[Request, np.void, str], None] = lambda request, record, finish: None

    def _lane(self, i: int, l: int, host: Host) -> _Lane:
        work = LaneRunner(host.executor(l), self._state, self.requests, self._width)
        return _Lane(f"instance-{i}-lane-{l}", work, partial(self._clock.post, 2 * i + l))

    def attach(self, runtime: Runtime) -> None:
        """Work for ``runtime``, which must be kept by whoever made it."""
        # Not a reference: in a cycle the KV pools of a closed engine would stay until a full garbage collection.
        self._runtime = weakref.proxy(runtime)
        self._words, self._slots = runtime.words, runtime.slots
        for i, host in enumerate(self._hosts):
            host.watch(partial(self._hear_of_loss, i))

    def _hear_of_loss(self, i: int, error: Exception) -> None:
        """Any thread: instance ``i`` is gone."""
        self._clock.post(self._slots.arrival, partial(self.lose, i, error))

    def stop(self, timeout_s: float = 5.0) -> bool:
        """End every thread, lanes first; False when one did not end in time. After the loop has ended."""
        ended = [lane.stop(timeout_s) for lane in self._lanes] + [mover.stop(timeout_s) for mover in self._movers]
        return all(ended)

    # -- requests ------------------------------------------------------------------------------------------

    def arrives(self, outcome: Callable[[], Any]) -> None:
        """Carry out what another thread asked for."""
        try:
            outcome()
        except Exception:  # whoever asked may have been wrong; the others are served
            _log.exception("something asked from outside failed")

    def admit(self, request: Request) -> None:
        """Give a new request a slot and let it arrive; there must be a free one."""
        if request.doomed is not None:
            self._tell_end(request, request.doomed)
            return
        r = request.slot = self._free.pop()
        try:
            self._fill_in(r, request)
        except Exception:  # something in it that no check knows: it ends alone
            _log.exception("request %s cannot be taken in", request.id)
            self.requests[r] = None
            self._state.req[r : r + 1] = self._blank
            self._free.append(r)
            self._tell_end(request, ERROR)
            self.on_refused(TurnedAway(request.number, request.cls, ERROR))
            return
        loop.begin(self._words, r, max(self._clock.ticks(request.handed_in), 0))

    def _fill_in(self, r: int, request: Request) -> None:
        """Write ``request`` into slot ``r``."""
        self.requests[r] = request
        self._state.req[r : r + 1] = self._blank
        record = self._state.req[r]
        record["prompt"], record["output"] = request.n_prompt, request.params.max_tokens
        record["cls"], record["ttft_slo"], record["tpot_slo"] = request.cls, request.ttft_slo, request.tpot_slo
        record["hash_off"], record["priority"] = r * self._hash_room, request.priority
        self._hash(request, request.n_prompt)
        request.due = request.n_prompt  # its first token is something to book

    def doom(self, request: Request, reason: str) -> None:
        """End ``request`` from outside: at once, or when what is in flight with it has ended."""
        if request.ended or request.doomed is not None:
            return
        request.doomed = reason
        if request.slot >= 0:
            self._doomed.add(request)
            self._sweep()

    def doom_all(self, reason: str) -> None:
        """:meth:`doom` every request that is here."""
        for request in [r for r in self.requests if r is not None]:
            self.doom(request, reason)

    def _sweep(self) -> None:
        """End the doomed that nothing in flight holds any more."""
        for request in list(self._doomed):
            if interrupt.abort(self._words, request.slot, self._clock.now):
                self._doomed.remove(request)

    def _hash(self, request: Request, tokens: int) -> None:
        """Extend the prefix hashes of ``request`` to what its first ``tokens`` tokens fill."""
        size = self._hash_tokens
        request.due = (tokens // size + 1) * size if size else NEVER
        if size == 0:
            return
        first, last = int(self._hashed[request.slot]), tokens // size
        if last > first:
            begin = request.slot * self._hash_room
            room = self._state.hashes[begin : begin + self._hash_room]
            loop.chain_hashes(request.tokens, size, self._salt, first, last, room)
            self._hashed[request.slot] = last

    # -- steps ---------------------------------------------------------------------------------------------

    def start_lane(self, i: int, l: int) -> None:
        lane = self._lanes[2 * i + l]
        step = lane.runner.describe(self._words, i, l)
        self._steps[2 * i + l] = step
        lane.run(step)

    def lane_ends(self, i: int, l: int, outcome: StepResult) -> None:
        step = self._steps[2 * i + l]
        assert step is not None
        self._steps[2 * i + l] = None
        if outcome.lost is not None:
            self.lose(i, outcome.lost)
            return
        for request, error in outcome.failed:
            self._fail(request, error)
        begun = []
        for request, delta in outcome.due:
            if request.n_tokens == request.n_prompt + 1 and request.doomed is None:
                begun.append(request)
            self._hash(request, request.n_tokens - 1)
            if delta.finish is not None:
                loop.last_token(self._words, request.slot)
        self._deltas.extend(outcome.deltas)
        self._runtime.book_lane(i, l)
        for request in begun:
            self._booked(self.on_first, request, self._state.req[request.slot])
        self._evacuate()
        self._sweep()

    def without_graph(self) -> Counter[str]:
        """Steps that were launched one by one where graphs were asked for, by reason; of this process's lanes."""
        counts = (getattr(lane.runner.executor, "without_graph", {}) for lane in self._lanes)
        return sum((Counter(dict(count)) for count in counts), Counter())

    def lose(self, i: int, error: Exception) -> None:
        """The thread or process of instance ``i`` is gone: what it had is recomputed by the others."""
        if i not in self.lost:
            self.lost.add(i)
            _log.error("instance %d is lost: %s", i, error)
            interrupt.lose(self._words, i)
        self._evacuate()
        self._sweep()

    def _evacuate(self) -> None:
        """Place anew what the lost instances hold, as far as nothing in flight uses it."""
        for i in self.lost:
            if self._steps[2 * i] is None and self._steps[2 * i + 1] is None:
                interrupt.evacuate(self._words, i)

    def _fail(self, request: Request, error: Exception) -> None:
        """A request failed in a step: it ends, and what the step wrote of it is never found in the prefix cache."""
        _log.error("request %s failed: %s", request.id, repr(error)[:200])
        self._hashed[request.slot] = 0
        if request.doomed is None:
            request.doomed = ERROR
            self._doomed.add(request)

    # -- transfers -----------------------------------------------------------------------------------------

    def start_link(self, link: int) -> None:
        source, target = np.zeros(self._width, np.int32), np.zeros(self._width, np.int32)
        r, sender, receiver, n = loop.describe_transfer(self._words, link, source, target)
        pairs = list(zip(source[:n].tolist(), target[:n].tolist(), strict=True))
        transfer = Transfer(self._pools[sender], self._pools[receiver], pairs)
        self._moving[link] = (transfer, r)
        self._clock.at(self._slots.links + link, self._clock.now + self._timeout)
        self._movers[link].fetch(transfer)

    def link_ends(self, link: int, outcome: Transfer | None) -> None:
        """``outcome``: the transfer that ended; None when the time of the present one is up."""
        if outcome in self._quarantine:
            instance, tail, n = self._quarantine.pop(outcome)
            interrupt.release_blocks(self._words, instance, tail, n)
            return
        transfer, r = self._moving.get(link, (None, -1))
        if transfer is None or outcome not in (None, transfer):
            return
        state = transfer.timed_out() if outcome is None else transfer.state
        slot = self._slots.links + link
        if state == TransferState.CANCELLING:
            self._clock.at(slot, self._clock.now + self._timeout)
            return
        if outcome is None and state == TransferState.DONE:
            return  # it ended just now, and its report is on the way
        self._clock.at(slot, NEVER)
        del self._moving[link]
        if state == TransferState.DONE:
            self._runtime.book_transfer(link)
        else:
            self._recompute(link, r, transfer, state == TransferState.LOST)
        self._evacuate()
        self._sweep()

    def _recompute(self, link: int, r: int, transfer: Transfer, lost: bool) -> None:
        receiver = int(self._state.req[r]["dest"])
        tail, n, starts = interrupt.fail_transfer(self._words, link, lost)
        if lost:
            self._quarantine[transfer] = (receiver, tail, n)
        self.transfer_failures += 1
        request = self.requests[r]
        assert request is not None
        request.transfer_failures += 1
        _log.warning(
            "KV transfer to instance %d %s: %s",
            receiver, "lost" if lost else "failed", transfer.error or "timeout",
        )  # fmt: skip
        if starts:
            self.start_link(link)
        if request.transfer_failures >= _MOST_TRANSFER_FAILURES:
            self.doom(request, ERROR)

    def start_switch(self, i: int) -> None:
        """Lanes and pools serve any role, so a drained instance has nothing left to do."""
        self._clock.post(self._slots.switches + i)

    # -- what callers hear ---------------------------------------------------------------------------------

    def settled(self) -> None:
        for request, delta in self._deltas:
            if request.doomed is None and not self.heard(request, delta):
                self.doom(request, ERROR)
        self._deltas.clear()
        done = int(self._n_done[0])
        if done != self._seen_done:
            self._seen_done = done
            self._part_with_ended()
        try:
            self.after_step()
        except Exception:  # the event loop it wakes may have ended
            _log.exception("what a step gave could not be passed on")

    def _part_with_ended(self) -> None:
        """Tell the callers of requests that ended, and free their slots."""
        ended = np.flatnonzero(self._state.req["state"] >= RequestState.FINISHED).tolist()
        for r in ended:
            request, record = self.requests[r], self._state.req[r]
            if request is None:
                continue
            finish = ""  # its last token has said it
            if request.doomed is not None:
                finish = request.doomed
            elif record["state"] == RequestState.SHED:
                finish = SHED
            elif record["state"] == RequestState.FAILED:
                finish = UNPLACEABLE
            request.cached_tokens = int(record["cached"])
            self._booked(self.on_end, request, record, finish)
            self.requests[r] = None
            self._doomed.discard(request)
            self._free.append(r)
            self._state.req[r : r + 1] = self._blank
            self._tell_end(request, finish)

    def _tell_end(self, request: Request, finish: str) -> None:
        request.ended = True
        if finish:
            self.heard(request, Delta(None, "", finish))
        request.sink = _nobody  # whoever listens may hold the request, and need not for ever
        self.on_gone()

    @staticmethod
    def _booked(book: Callable[..., None], request: Request, *what: Any) -> None:
        """Metrics and logs are no reason to stop serving."""
        try:
            book(request, *what)
        except Exception:
            _log.exception("what became of request %s could not be booked", request.id)

    @staticmethod
    def heard(request: Request, delta: Delta) -> bool:
        """Tell the caller of ``request``; False when that fails, and then it is told nothing more."""
        try:
            request.sink(delta)
        except Exception:
            _log.exception("whoever listens to request %s failed", request.id)
            request.sink = _nobody
            return False
        return True

    def is_over(self) -> bool:
        """Closed, and nothing is left to do."""
        if not self.closing:
            return False
        cluster = self._state.cluster[0]
        idle = bool((self._state.lane["kind"] == LaneKind.IDLE).all())
        return bool(cluster["n_done"] == cluster["n_sent"]) and idle and not self._moving
