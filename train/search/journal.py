"""What a search asked and was told, written down as it goes, so that an interrupted one goes on where it was.

A search is a function of its seed, of the answers it gets and of the clock. A resumed one is started from its beginning
and given the same answers and times again, read from the file, until that ends; from there on it simulates. So it ends
as the uninterrupted search would have, to the last bit, whatever it keeps in mind, and nothing of that is stored.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from engine.common.files import write_bytes
from engine.errors import SlalomError
from train.search.fitness import Fitness
from train.search.space import Design


class Journal:
    """One search's answers in order.

    :param path: file of JSON lines; None keeps nothing
    :param identity: what the answers follow from (code, scenario, settings, seed); a file of another one is begun anew
    :param clock: seconds, monotonic
    :raises SlalomError: the file cannot be written
    """

    def __init__(
        self, path: Path | None = None, identity: Any = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._begin = clock, clock()
        self._file: IO[bytes] | None = None
        self._known: list[Any] = []
        self._next = 0
        #: Whether a file was there that tells of another search.
        self.anew = False
        if path is None:
            return
        head = json.dumps({"search": identity}, sort_keys=True)
        try:
            self._known = _read(path, head)
            if not self._known:
                self.anew = path.exists() and path.stat().st_size > 0
                write_bytes(path, f"{head}\n".encode())
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise SlalomError("--out", str(path), f"choose a folder that can be written ({error.strerror})") from error
        self._next = 1

    @property
    def replays(self) -> bool:
        """Whether the next answer is known already."""
        return self._next < len(self._known)

    def ask(self, what: str, work: Callable[[], Any]) -> Any:
        """The answer to ``what``: as it was, or that of ``work``, JSON data.

        :raises SlalomError: the search asks something else than it did before
        """
        mark = zlib.crc32(what.encode())
        if self.replays:
            known = self._known[self._next]
            if known[0] != mark:
                fix = "the search goes another way than before; start anew in another folder"
                raise SlalomError("--resume", what, fix)
            self._next += 1
            if not self.replays:  # from here on the time goes on
                self._begin = self._clock() - known[2]
        else:
            known = [mark, work(), round(self._clock() - self._begin, 6)]
            self._write(known)
        return known[1]

    def seconds(self) -> float:
        """Since the search began, interruptions left out; as it was while answers are known."""
        found: float = self.ask("clock", lambda: self._clock() - self._begin)
        return found

    def close(self, *, done: bool = False) -> None:
        """:param done: the search has ended and its outcome is kept elsewhere: the file goes"""
        if self._file is not None:
            self._file.close()
            if done:
                Path(self._file.name).unlink(missing_ok=True)
            self._file = None

    def _write(self, known: list[Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(known, separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            fix = f"the search cannot be written down ({error.strerror}); go on with --resume once it can"
            raise SlalomError("output file", self._file.name, fix) from error


def _read(path: Path, head: str) -> list[Any]:
    """The lines of ``path``, if its first is ``head``; what a crash has left after the last whole one is cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    if data.partition(b"\n")[0] != head.encode():
        return []
    known: list[Any] = []
    whole = 0
    for line in data.splitlines(keepends=True):
        try:
            found = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            found = None
        if known and not (isinstance(found, list) and len(found) == 3):
            break
        known.append(found)
        whole += len(line)
    if whole < len(data):
        os.truncate(path, whole)
    return known


class Remembered:
    """A :class:`Fitness` whose answers go through a journal."""

    def __init__(self, fitness: Fitness, journal: Journal) -> None:
        self._fitness, self._journal = fitness, journal
        self.scenario, self.setting = fitness.scenario, fitness.setting

    @property
    def requests(self) -> int:
        """Simulated so far, in earlier parts of the search too."""
        return self._fitness.requests

    def score(self, design: Design, *given: Any, **named: Any) -> float:
        """See :meth:`Fitness.score`."""
        found: float = self._ask("score", design, given, named)
        return found

    def knee(self, design: Design, *given: Any, **named: Any) -> float:
        """See :meth:`Fitness.knee`."""
        found: float = self._ask("knee", design, given, named)
        return found

    def knees(self, design: Design, *given: Any, **named: Any) -> tuple[float, float]:
        """See :meth:`Fitness.knees`."""
        knee, strict = self._ask("knees", design, given, named)
        return knee, strict

    def length(self, *given: Any, **named: Any) -> int:
        """See :meth:`Fitness.length`; it simulates nothing."""
        return self._fitness.length(*given, **named)

    def _ask(self, what: str, design: Design, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        plain = [list(x) if isinstance(x, Sequence) else x for x in given]
        asked = json.dumps([what, self.scenario.name, design.rule, plain, named], sort_keys=True, default=str)

        def counted() -> Any:
            try:
                return [getattr(self._fitness, what)(design, *given, **named), None, self._fitness.requests]
            except SlalomError as error:  # an answer, too
                return [None, [error.field, str(error.value), error.fix], self._fitness.requests]

        found, refused, self._fitness.requests = self._journal.ask(asked, counted)
        if refused is not None:
            raise SlalomError(*refused)
        return found
