"""The decision log: one line of JSON a decision, later one with what became of the request.

The scheduler copies numbers into a ring (``policies.guard.log.ring``); a process of its own makes the text
(``policies.guard.log.writer``), ten times a second, and survives the server long enough to write the rest.
Lines have a ``type`` and a ``server``, the process that wrote them: numbers of requests, decisions and generations
begin anew with each:

* ``decision``: seq, time, kind, request, generation (of the policy), choice, action, advised (the policy's own
  answer), margin, reason, fallback, latency_us, context, candidates (with scores where the policy gives any)
* ``outcome``: request, class, finish, ttft_s and tpot_s as measured and as predicted at the decision, ttft_ok,
  tpot_ok, good; also of requests that were refused at the door
* ``policy``, ``mode``, ``breaker``, ``drift``, ``role``: what happened to the guard itself
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

from engine.errors import SlalomError
from engine.jit.sources import ROOT
from engine.live.fate import SERVER
from policies.guard.log.ring import Ring
from policies.guard.log.writer import Lines, Rotated, pump

_log = logging.getLogger("slalom.decisions")
_LONGEST_WAIT_S = 60.0
#: Not ``-m``: the package imports the module on the way, which Python would warn of in every server.
_WRITER = "import sys; from policies.guard.log.writer import main; main(sys.argv[1:])"


class DecisionLog:
    """:param path: the log; older ones are ``path.1``, ``path.2``, ...
    :param max_bytes: a file grows to this size
    :param keep: older files kept
    :param features: ``compact`` (some 2 kB a line at 16 instances) or ``full``: every column the policy could read
    :param ring_mb: memory between scheduler and writer
    :param writer: ``process``, or ``thread`` where a second process is not wanted (it then shares the interpreter)
    :raises SlalomError: the log cannot be written there
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int = 64 << 20,
        keep: int = 5,
        features: Literal["compact", "full"] = "compact",
        ring_mb: int = 16,
        writer: Literal["process", "thread"] = "process",
    ) -> None:
        self.path = Path(path)
        try:
            Rotated(self.path, max_bytes, keep).close()
        except OSError as error:
            raise SlalomError("decision log", str(path), f"cannot write there: {error}") from error
        shared = Path("/dev/shm")
        folder = shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
        name = folder / f"slalom-decisions-{os.getpid()}-{time.monotonic_ns()}"
        self._ring = Ring(name, ring_mb << 17)
        self.written = 0
        self._final_dropped = 0
        self._closed = False
        self._restarts, self._not_before = 0, 0.0
        self._helper: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        if writer == "process":
            self._arguments = [str(name), str(self.path.resolve()), str(max_bytes), str(keep), features, SERVER]
            self._start_process()
        else:
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._pump, args=(max_bytes, keep, features), daemon=True)
            self._thread.start()

    def _start_process(self) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, *self._arguments, str(os.getpid())],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the server
        )

    def _pump(self, max_bytes: int, keep: int, features: str) -> None:
        lines, file = Lines(features, SERVER), Rotated(self.path, max_bytes, keep)
        while not self._stop.wait(0.1):
            pump(self._ring, lines, file)
        pump(self._ring, lines, file)
        file.close()

    @property
    def dropped(self) -> int:
        """Records that found the ring full, so that they are in no log."""
        return self._final_dropped if self._closed else self._ring.dropped

    @property
    def writing(self) -> bool:
        """Whether somebody turns records into lines."""
        if self._closed:
            return False
        return self._process.poll() is None if self._process else True

    def decision(
        self, meta: np.ndarray, context: np.ndarray, candidates: np.ndarray, mask: np.ndarray, scores: np.ndarray
    ) -> None:
        """Log one decision; see :meth:`policies.guard.log.ring.Ring.put`. Scheduler's thread only, as is
        :meth:`note`."""
        if not self._closed and self._ring.put(meta, context, candidates, mask, scores):
            self.written += 1

    def note(self, kind: str, **content: Any) -> None:
        """Log a line of type ``kind``."""
        line = {"type": kind, "server": SERVER, "time": time.time(), **content}
        if not self._closed and self._ring.note(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY)):
            self.written += 1

    def look_after(self) -> None:
        """See that somebody writes. Cheap where it is so; starting a process takes a thread of its own."""
        if not self._closed and not self.writing and (self._helper is None or not self._helper.is_alive()):
            self._helper = threading.Thread(target=self.keep_writing, name="decision-log", daemon=True)
            self._helper.start()

    def keep_writing(self) -> None:
        """Start the writer again where it died, each time after a longer wait. Called now and then, by one thread."""
        if self._process is None or self.writing or self._closed or time.monotonic() < self._not_before:
            return
        self._not_before = time.monotonic() + min(2.0**self._restarts, _LONGEST_WAIT_S)
        self._restarts += 1
        _log.error("the decision log's writer ended with status %s; starting another", self._process.returncode)
        try:
            self._start_process()
        except OSError as error:
            _log.error("the decision log's writer cannot be started: %s", error)

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what is left and end the writer."""
        if self._closed:
            return
        if self._thread is not None:
            self._stop.set()
            self._thread.join(timeout_s)
        self._final_dropped, self._closed = self._ring.dropped, True
        path = self._ring.path
        self._ring.close()
        if self._process is not None:
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                _log.error("the decision log's writer did not end")
        path.unlink(missing_ok=True)
