"""Moving KV between pools: the receiver copies, and no state lasts for ever.

The states of a transfer, and what a timeout does in each::

    QUEUED ──► COPYING ──► DONE          arrived: the receiver may decode it
      │           │
      │ timeout   │ timeout
      ▼           ▼
    FAILED ◄── CANCELLING ──► LOST       nobody answered: its target blocks stay reserved until somebody does
                         timeout

Whoever fails is recomputed. Blocks that a copy may still write to are never given to somebody else.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from enum import IntEnum
from typing import Protocol

from engine.model.kv import KVPool


class TransferState(IntEnum):
    """See the module docstring."""

    QUEUED = 0
    COPYING = 1
    CANCELLING = 2
    DONE = 3
    FAILED = 4
    LOST = 5


class Transfer:
    """One request's KV on its way.

    :param blocks: (source block, target block) pairs, ids within their pools
    """

    def __init__(self, source: KVPool, target: KVPool, blocks: list[tuple[int, int]]) -> None:
        self.source, self.target, self.blocks = source, target, blocks
        self.error: Exception | None = None
        self._state = TransferState.QUEUED
        self._lock = threading.Lock()

    @property
    def state(self) -> TransferState:
        return self._state

    @property
    def cancelled(self) -> bool:
        """Whether the copy should stop where it is; also when it looks so late that it counts as lost."""
        return self._state in (TransferState.CANCELLING, TransferState.LOST)

    def move_to(self, new: TransferState, *, only_from: tuple[TransferState, ...]) -> bool:
        """Change state if the present one is among ``only_from``; both sides may try at once."""
        with self._lock:
            if self._state not in only_from:
                return False
            self._state = new
            return True

    def timed_out(self) -> TransferState:
        """Nothing was heard in time; returns the state that follows."""
        queued, copying, cancelling = (
            TransferState.QUEUED, TransferState.COPYING, TransferState.CANCELLING,
        )  # fmt: skip
        for old, new in (
            (queued, TransferState.FAILED),
            (cancelling, TransferState.LOST),
            (copying, cancelling),
        ):
            if self.move_to(new, only_from=(old,)):
                break
        return self._state


class Transport(Protocol):
    """How bytes get from one pool to another."""

    def copy(self, transfer: Transfer) -> None:
        """Copy every pair of ``transfer.blocks``; return early once ``transfer.cancelled``. May raise."""
        ...


class CopyTransport:
    """Pools of one process: gather and scatter, some blocks at a time."""

    _CHUNK = 64  # blocks between two looks at ``cancelled``

    def copy(self, transfer: Transfer) -> None:
        for k in range(0, len(transfer.blocks), self._CHUNK):
            if transfer.cancelled:
                return
            source, target = zip(*transfer.blocks[k : k + self._CHUNK], strict=True)
            transfer.target.copy_from(transfer.source, source, target)


class Mover:
    """The thread of one link: one transfer at a time, in order.

    :param report: called in this thread with every transfer that ended, whatever became of it
    """

    def __init__(self, name: str, transport: Transport, report: Callable[[Transfer], None]) -> None:
        self._transport, self._report = transport, report
        self._inbox: queue.SimpleQueue[Transfer | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def fetch(self, transfer: Transfer) -> None:
        """Begin ``transfer`` once those before it have ended."""
        self._inbox.put(transfer)

    def stop(self, timeout_s: float) -> bool:
        """End the thread after what is in hand; False when it did not end in time."""
        self._inbox.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (transfer := self._inbox.get()) is not None:
            self._carry_out(transfer)

    def _carry_out(self, transfer: Transfer) -> None:
        if not transfer.move_to(TransferState.COPYING, only_from=(TransferState.QUEUED,)):
            return  # given up before it began: nobody waits for it
        try:
            self._transport.copy(transfer)
        except Exception as error:  # a link may break in any way
            transfer.error = error
        finished = transfer.error is None and not transfer.cancelled
        transfer.move_to(
            TransferState.DONE if finished else TransferState.FAILED,
            only_from=(TransferState.COPYING, TransferState.CANCELLING),
        )
        self._report(transfer)
