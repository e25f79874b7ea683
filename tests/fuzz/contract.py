"""What every border keeps to, whatever comes: the input is taken, or one line says what is wrong.

Never another exception, never more than five seconds of computing, never 500 MB more memory. Time is the process's own
(so a busy machine fails nothing); memory is what the system lets the process have while a border is tried.
"""

from __future__ import annotations

import contextlib
import math
import resource
import signal
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import strategies as st

from engine.errors import SlalomError

SECONDS, MEMORY = 5, 500 * 2**20
#: How many examples: in every run of the tests, and in a long one (``pytest -m fuzz tests/fuzz``).
EXAMPLES = [60, pytest.param(2000, marks=pytest.mark.fuzz)]


class Hung(BaseException):
    """The border was still computing."""


@contextlib.contextmanager
def within_limits() -> Iterator[None]:
    """Ends what computes for too long with :class:`Hung`, and what takes too much memory with ``MemoryError``."""

    def hung(number: int, frame: FrameType | None) -> None:
        raise Hung

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    former = signal.signal(signal.SIGPROF, hung)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, former)


def keeps(read: Callable[[], Any]) -> Any:
    """What ``read`` gives; None where it refuses, in one line with field, value and remedy."""
    with within_limits():
        try:
            return read()
        except SlalomError as error:
            refusal = error
    text = str(refusal)
    assert text.isprintable(), text
    assert len(text) < 1500
    assert refusal.field, text
    assert refusal.fix, text
    return None


#: Values that break what was not thought of.
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2**15, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, -(2**31), -(2**63), 0.0,
    -0.0, 1e-300, 1e-9, 0.5, 1e9, 1e300, math.inf, -math.inf, math.nan, "", "x", "0", "nan", "1e400", "\x00", "a\nb",
    "\x1b[31m", "\u2028", "\ud800", "x" * 5000, [], {}, [[]], [None], {"": None}, {"x": {"y": []}}, [0] * 300,
    "../../etc/passwd",
]  # fmt: skip


def paths(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a document."""
    yield here
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, (*here, key))
    elif isinstance(value, list):
        for place, inner in enumerate(value[:8]):
            yield from paths(inner, (*here, place))


def _edited(document: Any, path: tuple[Any, ...], how: str, value: Any) -> Any:
    if not path:
        return value if how == "set" else document
    at = document
    for step in path[:-1]:
        try:
            at = at[step]
        except (KeyError, IndexError, TypeError):
            return document  # an earlier edit took it away
    last = path[-1]
    with contextlib.suppress(KeyError, IndexError, TypeError):
        if how == "set":
            at[last] = value
        elif how == "drop":
            del at[last]
        elif how == "wrap":
            at[last] = [at[last]]
        elif isinstance(at, list):
            at.insert(last, deepcopy(at[last]))
        else:
            at[f"{last}x"] = at[last]
    return document


@st.composite
def mutants(draw: st.DrawFn, document: Any) -> Any:
    """``document`` with one to three things set, dropped, wrapped or doubled."""
    places, found = list(paths(document)), deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        how = draw(st.sampled_from(["set", "set", "set", "set", "drop", "wrap", "double"]))
        found = _edited(found, draw(st.sampled_from(places)), how, deepcopy(draw(st.sampled_from(NASTY))))
    return found


_PIECES = [
    b"\0" * 40, b"\xff", b"[" * 200, b"{", b'"', b"\n", b"&a [*a]\n", b"9" * 400, b",,", b"NaN", b"\x1f\x8b"
]  # fmt: skip


@st.composite
def scrambled(draw: st.DrawFn, raw: bytes) -> bytes:
    """``raw`` cut, with bytes flipped, with a stretch repeated, or with something put in."""
    found = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(found) - 1, 0)))
        how = draw(st.sampled_from(["cut", "flip", "insert", "repeat", "drop"]))
        if how == "cut":
            del found[place:]
        elif how == "flip" and found:
            found[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "insert":
            found[place:place] = draw(st.sampled_from(_PIECES))
        elif how == "repeat":
            found[place:place] = found[place : place + 50]
        else:
            del found[place : place + draw(st.integers(1, 60))]
    return bytes(found)
