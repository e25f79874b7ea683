"""The campaign: which measurement comes next, until the error is small enough or the time is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest

from engine.calibration.bench import Bench, roofline, warm_up
from engine.calibration.design import KINDS, Space, held_out_error, next_points
from engine.calibration.live import host_time, link_time, neighbour_time, role_change_s
from engine.calibration.points import Kind, Measured, Point, Store
from engine.calibration.shares import measure_share
from engine.lanes.partitions import make_device
from engine.model.llama import Llama
from engine.model.tokenizer import Tokenizer

#: Points of the first, space-filling set beside the corners.
_FIRST = {"prefill": 9, "decode": 9, "fused": 6}
_BATCH = 4


@dataclass(frozen=True)
class Limits:
    """When to stop, seconds and fractions.

    :param budget_s: of measuring, everything included but loading the model
    :param error: stop once the held-out error of every kind of step is below
    :param least: points of a kind before its error is believed
    """

    budget_s: float = 240.0
    error: float = 0.015
    least: int = 24


class Campaign:
    """Measures into ``store`` until a limit is reached; what the store holds already is not measured again.

    :param shares: parts of the device that get a row of their own, SMs or cores
    :param warm: meet every shape once before anything is timed
    :param eager: without graphs, for an engine that has none
    :param say: hears of every point and every finding, for a progress bar
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        space: Space,
        store: Store,
        limits: Limits,
        *,
        instances: int = 1,
        shares: Sequence[int] = (),
        bench: Bench | None = None,
        warm: bool = True,
        eager: bool = False,
        say: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.tokenizer, self.space, self.store, self.limits = model, tokenizer, space, store, limits
        self.shares = tuple(shares)
        self.instances, self._warm, self._say, self._clock = instances, warm, say, clock
        self._eager, self._own = eager, bench is None
        self._bench = bench or Bench(model, kv_tokens=space.kv_tokens, max_batch=space.max_batch, eager=eager)
        self._begin = clock()
        self._end = limits.budget_s

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._begin

    @property
    def _over(self) -> bool:
        return self.elapsed_s > self._end

    def error(self, kind: Kind) -> float:
        """Held-out error of ``kind`` by the points so far."""
        return held_out_error(self.store.of(kind))

    def run(self) -> str:
        """Measure, once; returns why it stopped."""
        try:
            return self._run()
        finally:
            if self._own:
                self._bench.close()

    def _run(self) -> str:
        self._facts()
        # A first run compiles the scheduling core on the way; steps get half the budget all the same.
        self._end = max(self.limits.budget_s, self.elapsed_s + 0.5 * self.limits.budget_s)
        self._fill()
        seed = 1
        while not self._over:
            open_kinds = [kind for kind in KINDS if not self._settled(kind)]
            if not open_kinds:
                return f"held-out error below {100 * self.limits.error:g} %"
            kind = max(open_kinds, key=self._urgency)
            points = next_points(self.space, kind, self.store.of(kind), self.store.known(), _BATCH, seed)
            seed += 1
            if not points:
                return "no untried points are left"
            self._take(points)
        return f"the budget of {self.limits.budget_s:g} s is spent"

    def _settled(self, kind: Kind) -> bool:
        return len(self.store.of(kind)) >= self.limits.least and self.error(kind) <= self.limits.error

    def _urgency(self, kind: Kind) -> float:
        """Large error and few points first."""
        return self.error(kind) / (1.0 + len(self.store.of(kind)))

    def _facts(self) -> None:
        """Everything that is not a step time; each finding is kept as soon as it is there."""
        notes, note = self.store.notes, self.store.note
        if self._warm:
            self._say("warming up")
            warm_up(self.model, min(self.space.max_tokens + self.space.max_batch, 2048), self.space.max_batch)
        batches = (1, min(8, self.space.max_batch))
        tasks: list[tuple[str, Callable[[], object]]] = [
            ("roofline", lambda: roofline(self.model)),
            ("host", lambda: asdict(host_time(self.model, self.tokenizer, batches, eager=self._eager))),
            ("link", lambda: asdict(link_time(self.model, self.tokenizer, self.space.max_tokens, eager=self._eager))),
            ("switch_s", lambda: role_change_s(self.model, self.tokenizer, eager=self._eager)),
        ]
        tasks += [(f"share_{size}", partial(self._share, size)) for size in self.shares]
        if self.instances > 1:
            tasks.append((f"neighbours_{self.instances - 1}", self._neighbours))
        for name, task in tasks:
            if name in notes:
                continue
            self._say(f"measuring {name}")
            try:
                note(name, task())
            except Exception as error:  # the profile can do without, and says so
                note(f"{name}_failed", f"{type(error).__name__}: {error}"[:200])

    def _share(self, size: int) -> dict[str, float]:
        """A part of the device, see :mod:`engine.calibration.shares`."""
        device = make_device(self._bench.device.type, self._bench.device.index or 0)
        try:
            return measure_share(self.model, device, self.space, size, eager=self._eager)
        finally:
            device.close()

    def _neighbours(self) -> dict[str, float]:
        batches = sorted({1, min(4, self.space.max_batch), min(8, self.space.max_batch)})
        return neighbour_time(self.model, self.tokenizer, self.instances, batches, eager=self._eager)

    def _fill(self) -> None:
        known = self.store.known()
        sets = [[*self.space.corners(kind), *self.space.scatter(kind, _FIRST[kind])] for kind in KINDS]
        turns = [p for turn in zip_longest(*sets) for p in turn if p is not None]
        self._take([p for p in turns if p not in known])

    def _take(self, points: Sequence[Point]) -> None:
        for point in points:
            if self._over:
                return
            measured: Measured = self._bench.measure(point)
            self.store.add(measured)
            self._say(f"{point.kind}: {len(self.store.of(point.kind))} points")
