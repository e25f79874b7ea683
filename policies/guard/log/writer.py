"""Turns the ring's records into lines of JSON, in a process of its own: the scheduler shares no interpreter with it.

Its arguments: RING LOG MAX_BYTES KEEP FEATURES SERVER PARENT. It ends when the ring is closed or its parent is gone,
after it has written everything that was left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from engine.common.appends import whole_bytes
from engine.core.columns import CONTEXT_DIMENSIONLESS, N_CANDIDATE, N_CONTEXT, Col, Ctx, Kind
from policies.guard.log.ring import HEAD, Control, Meta, Ring, Type

#: Why a decision was answered as it was; everything but the first two is the fallback's answer.
REASONS = (
    "policy", "advisory", "frozen", "restore", "breaker", "ood", "features", "deadline", "busy", "error", "invalid",
    "scores", "drift",
)  # fmt: skip

#: What a compact line says of a candidate; the raw columns are physical, so a person can check them.
_COMPACT = (
    Col.TTFT_S, Col.WAIT_S, Col.PREFILL_S, Col.STEP_WITH_S, Col.MIN_SLACK_S, Col.TRANSFER_S,
    Col.OUTSTANDING, Col.RUN_N, Col.QUEUE_N, Col.CACHED_TOKENS, Col.FREE_BLOCKS,
)  # fmt: skip
_COMPACT_CONTEXT = (
    Ctx.PROMPT, Ctx.TTFT_SLO_S, Ctx.TPOT_SLO_S, Ctx.CLASS, Ctx.GENERATED, Ctx.SOURCE, Ctx.ISOLATED_S, Ctx.HELD_N,
)  # fmt: skip
_ROLES = ("prefill", "decode", "mixed", "multiplexed")
_PERIOD_S = 0.1
_log = logging.getLogger("slalom.decisions")


def action_name(kind: int, choice: int, row: np.ndarray) -> str:
    """A candidate in words."""
    instance = int(row[Col.INSTANCE])
    if row[Col.IS_HOLD] == 1.0 and instance < 0:
        return "hold"
    if row[Col.IS_SHED] == 1.0 and instance < 0:
        return "shed"
    if instance < 0:
        return "keep"
    if kind == Kind.REALLOCATE:
        return f"instance {instance} to {_ROLES[int(row[Col.NEW_ROLE])]}"
    if kind == Kind.TUNE:
        what = ("keep", "less decode SMs", "more decode SMs", "half the chunk", "twice the chunk")
        return f"instance {instance}: {what[choice]}"
    return f"instance {instance}"


class Lines:
    """Records as JSON lines.

    :param features: ``compact``, or ``full`` for every column
    :param server: the process whose decisions these are
    """

    def __init__(self, features: str = "compact", server: str = "") -> None:
        self._full, self._server = features == "full", server

    def line(self, record: np.ndarray) -> bytes:
        """One record (int64 cells, see ``policies.guard.log.ring``) as a line."""
        if record[1] == Type.NOTE:
            return bytes(record[HEAD + 1 :].view(np.uint8)[: record[HEAD]]) + b"\n"
        return orjson.dumps(self.decision(record), option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)

    def decision(self, record: np.ndarray) -> dict[str, Any]:
        """The content of a DECISION record."""
        meta = record[HEAD : HEAD + len(Meta)]
        numbers = record[HEAD + len(Meta) :].view(np.float32)
        rows, kind, choice = int(meta[Meta.ROWS]), int(meta[Meta.KIND]), int(meta[Meta.CHOICE])
        context, end = numbers[:N_CONTEXT], N_CONTEXT + rows * N_CANDIDATE
        candidates = numbers[N_CONTEXT:end].reshape(rows, N_CANDIDATE)
        mask = numbers[end : end + rows] != 0
        n_scores = int(meta[Meta.SCORES])
        scores = numbers[end + rows : end + rows + n_scores] if n_scores else None
        reason, advised = REASONS[meta[Meta.REASON]], int(meta[Meta.ADVISED])
        return {
            "type": "decision",
            "server": self._server,
            "seq": int(meta[Meta.SEQ]),
            "time": int(meta[Meta.TIME_NS]) / 1e9,
            "now_s": int(meta[Meta.NOW]) / 1e9,
            "kind": Kind(kind).name.lower(),
            "request": int(meta[Meta.REQUEST]),
            "generation": int(meta[Meta.GENERATION]),
            "choice": choice,
            "action": action_name(kind, choice, candidates[choice]),
            "advised": advised if advised >= 0 else None,
            "margin": _margin(scores, mask, advised),
            "reason": reason,
            "fallback": reason not in ("policy", "advisory"),
            "latency_us": int(meta[Meta.LATENCY_NS]) / 1e3,
            "context": self._context(context),
            "candidates": [
                self._candidate(kind, k, candidates[k], scores)
                for k in range(rows)
                if mask[k] and (kind < Kind.REALLOCATE or k in (0, choice, advised) or self._full)
            ],
        }

    def _context(self, context: np.ndarray) -> dict[str, float]:
        if self._full:
            return {c.name.lower(): _short(context[c]) for c in Ctx}
        chosen = {c.name.lower(): _short(context[c]) for c in _COMPACT_CONTEXT}
        used = {c.name.lower(): _short(context[c]) for c in Ctx if 4 <= c < CONTEXT_DIMENSIONLESS and context[c] != 0}
        return chosen | used

    def _candidate(self, kind: int, k: int, row: np.ndarray, scores: np.ndarray | None) -> dict[str, Any]:
        known: dict[str, Any] = {"row": k, "action": action_name(kind, k, row)}
        if scores is not None:
            known["score"] = _short(scores[k])
        if self._full:
            return known | {c.name.lower(): _short(row[c]) for c in Col}
        if row[Col.INSTANCE] < 0:
            return known
        return known | {c.name.lower(): _short(row[c]) for c in _COMPACT if row[c] != 0}


def _short(x: Any) -> float:
    """Four digits after the first are more than a decision ever turned on; NaN becomes null in JSON."""
    return float(f"{float(x):.5g}")


def _margin(scores: np.ndarray | None, mask: np.ndarray, choice: int) -> float | None:
    """By how much the policy's answer beat the next best candidate's score."""
    if scores is None or not 0 <= choice < len(scores) or mask.sum() < 2:
        return None
    others = mask.copy()
    others[choice] = False
    best = float(scores[choice] - scores[others].max()) if others.any() else np.nan
    return _short(best) if np.isfinite(best) else None


class Rotated:
    """An append-only file that becomes FILE.1 (and FILE.1 FILE.2, ...) when it is full.

    :param keep: old files kept
    """

    def __init__(self, path: Path, max_bytes: int, keep: int) -> None:
        self._path, self._max, self._keep = path, max_bytes, keep
        self._failing = False
        self._lost = 0  # lines since it began to fail
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open()

    def _open(self) -> BinaryIO:
        file = open(self._path, "a+b", buffering=0)  # noqa: SIM115  (kept open)
        self._size = whole_bytes(file)
        if self._size < file.seek(0, os.SEEK_END):
            file.truncate(self._size)  # what was being written when the power went
        return file

    def write(self, lines: list[bytes]) -> int:
        """Append whole lines; returns how many. The others are gone: a disk that is full must not stop anybody."""
        done = 0
        try:
            for line in lines:
                if self._size and self._size + len(line) > self._max:
                    self._rotate()
                self._append(line)
                done += 1
        except OSError as error:
            self._lost += len(lines) - done
            if not self._failing:
                _log.error("decision log %s: %s; what cannot be written is counted (said once)", self._path, error)
            self._failing = True
            return done
        if self._failing and lines:
            _log.warning("decision log %s: written again, %d lines are missing", self._path, self._lost)
            self._failing, self._lost = False, 0
        return done

    def _append(self, line: bytes) -> None:
        """Write ``line`` whole or not at all."""
        if self._file.closed:
            self._file = self._open()
        try:
            done = 0
            while done < len(line):
                done += self._file.write(line[done:])
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise
        self._size += len(line)

    def _rotate(self) -> None:
        self._file.close()
        for n in range(self._keep, 0, -1):
            old = self._path.with_name(f"{self._path.name}.{n - 1}") if n > 1 else self._path
            if old.exists():
                os.replace(old, self._path.with_name(f"{self._path.name}.{n}"))
        if self._keep == 0:
            self._path.unlink(missing_ok=True)
        self._file = self._open()

    def close(self) -> None:
        self._file.close()


def pump(ring: Ring, lines: Lines, file: Rotated) -> int:
    """Write what is in the ring; returns how many records it held. Those that came to nothing are counted there."""
    records = ring.take()
    if records:
        made = []
        for record in records:
            with contextlib.suppress(Exception):  # a record that is none is no reason to write no others
                made.append(lines.line(record))
        ring.control[Control.LOST] += len(records) - file.write(made)
    return len(records)


def main(arguments: list[str]) -> None:
    """Serve one ring until it is closed or orphaned."""
    ring_path, log, max_bytes, keep, features, server, parent = arguments
    for number in (signal.SIGINT, signal.SIGTERM):  # they are meant for the server, which then closes the ring
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(5)
    ring = Ring(Path(ring_path))
    lines, file = Lines(features, server), Rotated(Path(log), int(max_bytes), int(keep))
    try:
        over = False
        while True:
            pump(ring, lines, file)
            if over:
                return
            # One more round after the end was seen: what was written before it is there by then.
            over = bool(ring.control[Control.CLOSED]) or os.getppid() != int(parent)
            if not over:
                time.sleep(_PERIOD_S)
    finally:
        file.close()
        Path(ring_path).unlink(missing_ok=True)
