"""A thread that asks code we did not write, so that the scheduler can stop waiting for it.

How far the deadline holds: the scheduler waits ``deadline`` on a lock and goes on without the answer. Code that
sleeps, blocks or computes without the interpreter's lock (compiled code) costs exactly that. A loop in pure Python
shares the interpreter: it is interrupted by an exception, which arrives within the interpreter's switch interval
(``sys.getswitchinterval``, 5 ms by default). A C extension that holds the interpreter's lock for long cannot be
stopped by anybody in the same process: such a policy belongs behind a socket. While the thread is stuck, no decision
waits for it again.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from typing import Any

import numpy as np


class Late(Exception):
    """The deadline passed without an answer."""


class Busy(Exception):
    """The thread is still at an earlier question."""


class _Abandoned(BaseException):
    """Raised inside a policy whose answer nobody waits for any more."""


class Worker:
    """Asks one policy with its own copies of everything, so that a late policy cannot write into a later decision."""

    def __init__(self, decide: Any, params: np.ndarray, memory: np.ndarray) -> None:
        self._decide, self._params, self._memory = decide, params.copy(), memory.copy()
        self._asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        self._ticket = 0
        self._pending = 0  # the ticket still being worked on, 0 none
        self._thread = threading.Thread(target=self._work, name="policy", daemon=True)
        self._thread.start()

    def ask(self, context: np.ndarray, candidates: np.ndarray, mask: np.ndarray, deadline_s: float) -> Any:
        """The policy's answer.

        :raises Late: not within ``deadline_s``
        :raises Busy: an earlier question is not answered yet
        :raises Exception: what the policy raised
        """
        if self._pending and not self._caught_up():
            raise Busy
        self._ticket += 1
        self._asked.put((self._ticket, context.copy(), candidates.copy(), mask.copy()))
        end = time.perf_counter() + deadline_s
        try:
            ticket = 0
            while ticket != self._ticket:  # what was abandoned may still be in the queue
                left = max(end - time.perf_counter(), 0.0)
                ticket, answer, error = self._answers.get(timeout=left)
        except queue.Empty:
            self._pending = self._ticket
            self._interrupt()
            raise Late from None
        if isinstance(error, _Abandoned):
            raise Late
        if isinstance(error, Exception):
            raise error
        if error is not None:  # SystemExit and its like are not for the scheduler
            raise RuntimeError(repr(error))
        return answer

    def _caught_up(self) -> bool:
        try:
            while True:
                if self._answers.get_nowait()[0] == self._pending:
                    self._pending = 0
        except queue.Empty:
            return self._pending == 0

    def _interrupt(self) -> None:
        """Raise in the policy's thread at its next line of Python."""
        thread = self._thread.ident
        if thread is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Abandoned))

    def stop(self) -> None:
        """Let the thread end when it comes back (it is a daemon: a stuck one does not keep the process)."""
        self._asked.put(None)

    def _work(self) -> None:
        over = False
        while not over:
            try:
                over = self._serve()
            except _Abandoned as left:  # it arrived outside the policy: whatever was asked has no answer
                self._answers.put((self._ticket, None, left))

    def _serve(self) -> bool:
        """Answer one question; True when there will be no more."""
        asked = self._asked.get()
        if asked is None:
            return True
        ticket, context, candidates, mask = asked
        error: BaseException | None = None
        answer = None
        try:
            answer = self._decide(context, candidates, mask, self._params, self._memory)
        except BaseException as raised:  # whatever somebody else's code may raise
            error = raised
        self._answers.put((ticket, answer, error))
        return False
