"""Instances that compute: a thread a lane, a thread a link, and the book of requests that they serve."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from engine.core import loop
from engine.core.events import interrupt
from engine.core.kinds import LaneKind
from engine.core.state import NEVER, ClusterState
from engine.latency.evaluate import to_ticks
from engine.live.book import RequestBook
from engine.live.clock import WallClock
from engine.live.hosts import Host, InstanceLost
from engine.live.request import ERROR, Request
from engine.live.steps import LaneRunner, Step, StepResult
from engine.live.transfer import Mover, Transfer, TransferState, Transport

_log = logging.getLogger("slalom.instance")
#: A request whose KV could not be moved this often ends with an error.
_MOST_TRANSFER_FAILURES = 3


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
            begin, thread = time.perf_counter(), time.thread_time()
            try:
                result = self.runner.run(step)
            except BaseException as error:  # this thread ends; whoever waits for it must hear so
                self._report(StepResult([], InstanceLost(f"the thread of the lane ended: {error!r}")))
                return
            seconds = time.perf_counter() - begin, time.thread_time() - thread
            self._report(result._replace(run_s=seconds[0], cpu_s=seconds[1]))


class LiveInstances(RequestBook[Request]):
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
        super().__init__(state, clock, salt=salt)
        self.hosts, self._pools = hosts, [host.pool for host in hosts]
        self._width = max(int(p["n_blocks"]) for p in state.pool)
        self._steps: list[Step | None] = [None] * (2 * len(hosts))  # in flight, by lane
        self._lanes = [self._lane(i, l, host) for i, host in enumerate(hosts) for l in range(2)]
        self._movers = [
            Mover(f"link-{k}", transport, partial(clock.post, self._slots.links + k)) for k in range(len(state.link))
        ]
        self._timeout = to_ticks(timeout_s)
        self._moving: dict[int, tuple[Transfer, int]] = {}  # by link: what is on it, and whose KV (slot)
        self._quarantine: dict[Transfer, tuple[int, int, int]] = {}  # lost ones: instance, last block, blocks
        for i, host in enumerate(hosts):
            host.watch(partial(self._hear_of_loss, i))

    def _lane(self, i: int, l: int, host: Host) -> _Lane:
        work = LaneRunner(host.executor(l), self._state, self.requests, self._width)
        return _Lane(f"instance-{i}-lane-{l}", work, partial(self._clock.post, 2 * i + l))

    def _hear_of_loss(self, i: int, error: Exception) -> None:
        """Any thread: instance ``i`` is gone."""
        self._clock.post(self._slots.arrival, partial(self.lose, i, error))

    def stop(self, timeout_s: float = 5.0) -> bool:
        """End every thread, lanes first, then the hosts; False when one did not end in time. After the loop."""
        ended = [lane.stop(timeout_s) for lane in self._lanes] + [mover.stop(timeout_s) for mover in self._movers]
        if not all(ended):
            return False
        for host in self.hosts:
            host.close()
        return True

    # -- steps ---------------------------------------------------------------------------------------------

    def start_lane(self, i: int, l: int) -> None:
        lane = self._lanes[2 * i + l]
        step = lane.runner.describe(self._words, i, l)
        self._steps[2 * i + l] = step
        self.announce(lambda observer: observer.step_started(i, l))
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
        loop.finish_lane(self._words, i, l, self._clock.now)
        self.announce(lambda observer: observer.step_ended(i, l, outcome.run_s, outcome.cpu_s))
        for request in begun:
            self._tell_begun(request)
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
        self._state.req["hash_n"][request.slot] = 0
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
        self.announce(lambda observer: observer.link_started(link, n))
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
            self.announce(lambda observer: observer.link_ended(link))
            if loop.finish_transfer(self._words, link, self._clock.now):
                self.start_link(link)
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

    def is_over(self) -> bool:
        """Closed, and nothing is left to do."""
        if not self.closing:
            return False
        cluster = self._state.cluster[0]
        idle = bool((self._state.lane["kind"] == LaneKind.IDLE).all())
        return bool(cluster["n_done"] == cluster["n_sent"]) and idle and not self._moving
