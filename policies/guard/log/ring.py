"""A ring of decision records in memory that two processes share: the scheduler writes, the log's writer reads.

The scheduler only copies numbers (about 2 µs at 16 instances) and never waits: when the reader falls behind, records
are dropped and counted. Because the memory outlives the scheduler's process, nothing is lost when that is killed.

Layout, int64 cells: a control block, then records. A record is ``[cells, type, payload...]`` and lies in one piece; a
record that does not fit before the end leaves a skip mark there. ``WRITTEN`` and ``READ`` count cells since the start.
"""

from __future__ import annotations

import contextlib
import mmap
from enum import IntEnum
from pathlib import Path

import numpy as np

from engine.jit.kernel import kernel

_CONTROL = 16
_NO_MASK = np.zeros(0, np.uint8)
#: Cells of one record before its numbers: length, type, then :class:`Meta`.
HEAD = 2


class Control(IntEnum):
    """Cells of the control block."""

    CELLS = 0  # of the ring itself
    WRITTEN = 1
    READ = 2
    DROPPED = 3  # records that did not fit
    CLOSED = 4  # 1: the writer may end once it has read everything
    LOST = 5  # records that the writer could not write


class Type(IntEnum):
    """What a record is."""

    SKIP = 0  # nothing up to the end of the ring
    DECISION = 1  # Meta, then float32: context (C,), candidates (K, F), mask (K,), scores (n_scores,)
    NOTE = 2  # [bytes], then JSON text


class Meta(IntEnum):
    """Integers of a DECISION record."""

    SEQ = 0
    TIME_NS = 1  # wall clock, since 1970
    NOW = 2  # nanoseconds of the engine's clock
    KIND = 3
    REQUEST = 4  # number that the client sees (cmpl-17 is 17); -1 for control decisions
    ROWS = 5
    CHOICE = 6  # what was carried out
    ADVISED = 7  # what the policy answered; -1 when it was not asked or gave no answer
    REASON = 8
    LATENCY_NS = 9
    GENERATION = 10  # of the policy: one more at each swap
    SCORES = 11
    SUBJECT = 12  # PLACE_*: request slot; TUNE: instance


@kernel
def _put(ring, control, meta, context, candidates, mask, scores):
    """Append a DECISION record; returns cells written, 0 when there was no room."""
    k, f, c = candidates.shape[0], candidates.shape[1], context.shape[0]
    n_meta, n_scores = meta.shape[0], scores.shape[0]
    floats = c + k * f + k + n_scores
    need = 2 + n_meta + (floats + 1) // 2
    at = _room(ring, control, need)
    if at < 0:
        return 0
    ring[at] = need
    ring[at + 1] = 1
    for j in range(n_meta):
        ring[at + 2 + j] = meta[j]
    out = ring[at + 2 + n_meta : at + need].view(np.float32)
    for j in range(c):
        out[j] = context[j]
    n = c
    for row in range(k):
        for j in range(f):
            out[n] = candidates[row, j]
            n += 1
    for row in range(k):
        out[n] = mask[row]
        n += 1
    for j in range(n_scores):
        out[n] = scores[j]
        n += 1
    return need


@kernel
def _room(ring, control, need):
    """Index where ``need`` cells in one piece may be written, after a skip mark where needed; -1 when full."""
    cells = ring.shape[0]
    written = control[1]
    free = cells - (written - control[2])
    at = written % cells
    if at + need > cells:
        gap = cells - at
        if need + gap > free:
            return -1
        ring[at] = gap
        if gap > 1:
            ring[at + 1] = 0
        control[1] = written + gap
        return 0
    if need > free:
        return -1
    return at


def _compile() -> None:
    """Compile what a decision calls now rather than during the first one."""
    empty, row = np.zeros(0), np.zeros((0, 1))
    _put(np.zeros(8, np.int64), np.zeros(_CONTROL, np.int64), np.zeros(0, np.int64), empty, row, _NO_MASK, empty)


class Ring:
    """:param path: the file behind the memory
    :param cells: capacity in int64 cells for a new ring; 0 opens one that is there
    """

    def __init__(self, path: Path, cells: int = 0) -> None:
        self.path = path
        if cells:
            with open(path, "wb") as file:
                file.truncate(8 * (_CONTROL + cells))
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        whole = np.frombuffer(self._map, np.int64)
        self.control, self.cells = whole[:_CONTROL], whole[_CONTROL:]
        if cells:
            self.control[Control.CELLS] = cells
            whole[_CONTROL:] = 0  # touch every page now rather than during a decision
            _compile()

    def put(
        self, meta: np.ndarray, context: np.ndarray, candidates: np.ndarray, mask: np.ndarray, scores: np.ndarray
    ) -> bool:
        """Append a decision; False when there was no room.

        :param meta: int64 (len(Meta),); ``scores`` float64 (K,) or empty; the others as a policy gets them
        """
        return self._commit(_put(self.cells, self.control, meta, context, candidates, mask, scores))

    def note(self, text: bytes) -> bool:
        """Append a line of JSON; False when there was no room."""
        need = HEAD + 1 + (len(text) + 7) // 8
        at = _room(self.cells, self.control, need)
        if at < 0:
            return self._commit(0)
        self.cells[at + 2] = len(text)
        self.cells[at + 3 : at + need].view(np.uint8)[: len(text)] = np.frombuffer(text, np.uint8)
        self.cells[at], self.cells[at + 1] = need, Type.NOTE
        return self._commit(need)

    def _commit(self, need: int) -> bool:
        # Apart from the copy and after it: who sees the new count sees the record.
        self.control[Control.WRITTEN if need else Control.DROPPED] += need or 1
        return need > 0

    def take(self) -> list[np.ndarray]:
        """Every record written so far, as copies; their room is free then. For the reading side."""
        records = []
        read, written = int(self.control[Control.READ]), int(self.control[Control.WRITTEN])
        cells = len(self.cells)
        while read < written:
            at = read % cells
            n = int(self.cells[at])
            if n < 1 or at + n > cells:
                break  # not ours to interpret: a torn record would end the log, never crash it
            if n > 1 and self.cells[at + 1] != Type.SKIP:
                records.append(self.cells[at : at + n].copy())
            read += n
        self.control[Control.READ] = read
        return records

    @property
    def dropped(self) -> int:
        """Records for which there was no room, here or on the disk."""
        return int(self.control[Control.DROPPED] + self.control[Control.LOST])

    def close(self) -> None:
        """Let go of the memory; a reader that has it open keeps it."""
        self.control[Control.CLOSED] = 1
        del self.control, self.cells
        with contextlib.suppress(BufferError):  # somebody still holds a view: the collector will close it
            self._map.close()
