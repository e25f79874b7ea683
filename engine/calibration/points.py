"""Measured points: what was run, how long it took, and a file that survives being killed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from engine.common.appends import append_line, heal
from engine.common.regular import check_regular
from engine.errors import SlalomError

_log = logging.getLogger("slalom.calibrate")
Kind = Literal["prefill", "decode", "fused"]


@dataclass(frozen=True)
class Point:
    """One step to be timed.

    :param prompts: equal prompts of ``n`` new tokens behind ``r`` cached ones (0 prompts: decode only)
    :param bs: sequences that decode, each with ``ctx`` tokens of KV
    """

    kind: Kind
    n: int = 0
    r: int = 0
    prompts: int = 0
    bs: int = 0
    ctx: int = 0

    @property
    def tokens(self) -> int:
        """KV tokens that the step touches: what a pool must hold."""
        return self.prompts * (self.n + self.r) + self.bs * (self.ctx + 1)

    @property
    def rows(self) -> int:
        """Tokens that the step computes."""
        return self.prompts * self.n + self.bs


@dataclass(frozen=True)
class Measured:
    """What a point gave.

    :param seconds: the figure to believe, see :func:`engine.calibration.bench.believed`
    :param wall_s: median by the clock on the wall; ``cpu_s`` by that of the thread (0 where the device is no CPU)
    :param spread: interquartile range ÷ median of the repeats
    :param busy: somebody else was using the machine (wall and thread time part)
    :param failed: why there is no figure; empty when there is one
    """

    point: Point
    seconds: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    spread: float = 0.0
    repeats: int = 0
    busy: bool = False
    failed: str = ""


class Store:
    """A file of JSON lines that is only ever appended to; what a crash cut off at its end is left out.

    :param identity: what all points have in common (model, device, versions); the file's first line
    :raises SlalomError: the file holds points of something else
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path, self._identity = path, json.loads(json.dumps(dict(identity)))
        self.points: list[Measured] = []
        self.notes: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > 0:
            self._read()
        else:
            self._append({"identity": self._identity})

    def _read(self) -> None:
        check_regular(self.path)
        heal(self.path)
        rows = list(self._rows())
        found = rows[0].get("identity") if rows else self._identity
        if not rows:
            self._append({"identity": self._identity})
        if found != self._identity:
            found = found if isinstance(found, dict) else {}
            differ = sorted(k for k in {*found, *self._identity} if found.get(k) != self._identity.get(k))
            fix = f"these points were measured with another {', '.join(differ)}; delete the file or use another --out"
            raise SlalomError("measured points", str(self.path), fix)
        left_out = 0
        for row in rows[1:]:
            try:
                if "note" in row:
                    self.notes[str(row["note"])] = row["value"]
                else:
                    self.points.append(_measured(row))
            except (KeyError, TypeError):
                left_out += 1
        if left_out:
            _log.warning("%s: %d damaged lines are left out and measured anew", self.path, left_out)

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Every line; a damaged one is empty."""
        for line in self.path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else {}

    def add(self, measured: Measured) -> None:
        """Keep one more point, on disk before this returns."""
        self.points.append(measured)
        self._append(asdict(measured))

    def note(self, name: str, value: Any) -> None:
        """Keep a finding that is no point (host time, bandwidth); the latest of a name counts."""
        self.notes[name] = value
        self._append({"note": name, "value": value})

    def of(self, kind: Kind) -> list[Measured]:
        """The points of ``kind`` that gave a figure."""
        return [m for m in self.points if m.point.kind == kind and not m.failed]

    def known(self) -> set[Point]:
        """Every point that was tried, failed ones included."""
        return {m.point for m in self.points}

    def failures(self) -> list[Measured]:
        return [m for m in self.points if m.failed]

    def _append(self, row: Mapping[str, Any]) -> None:
        append_line(self.path, json.dumps(row, allow_nan=False).encode(), sync=True)


def _measured(row: dict[str, Any]) -> Measured:
    """:raises TypeError: a field is missing, unknown or of another type"""
    point = Point(**row["point"])
    if any(type(value) is not (str if name == "kind" else int) for name, value in asdict(point).items()):
        raise TypeError("point")
    found = Measured(**(row | {"point": point}))
    for each in fields(found):
        value = getattr(found, each.name)
        if each.name != "point" and not isinstance(value, float | int if each.type == "float" else type(each.default)):
            raise TypeError(each.name)
    return found


def arrays(points: Iterable[Measured], *names: str) -> list[list[float]]:
    """Columns of points: fields of :class:`Point`, or ``seconds``."""
    rows = list(points)
    return [[float(m.seconds if name == "seconds" else getattr(m.point, name)) for m in rows] for name in names]
