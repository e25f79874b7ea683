"""Parts of a device: how much slower a phase is on some of its SMs or cores, and beside the other phase on the rest.

A few steps stand for all: a share's row is the whole device's fit, prefill and decode each times one factor. Lanes and
graphs are those that an engine has, so what is measured is what a MULTIPLEXED instance runs on.
Not yet verified on a GPU.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.calibration.bench import Bench, believed
from engine.calibration.design import Space
from engine.calibration.points import Point
from engine.kernels import Spans
from engine.lanes.base import WHOLE, Device
from engine.live.graphs import Capturer
from engine.model.llama import Llama

_REPEATS = 5


def share_sizes(total: int) -> list[int]:
    """Shares worth a row on a device of ``total`` units: quarters, in whole eights where it has many (SM groups)."""
    grain = 8 if total >= 32 else 1
    found = {max(round(total * q / grain), 1) * grain for q in (0.25, 0.5, 0.75)}
    return sorted(size for size in found if 0 < size < total)


@dataclass(frozen=True)
class _Place:
    """A lane of a bench on one of its partitions."""

    bench: Bench
    l: int
    partition: int = WHOLE

    def step(self, spans: Spans) -> None:
        self.bench.step(spans, self.l, self.partition)


def _timed(place: _Place, point: Point) -> float:
    """Believed seconds of ``point`` at ``place``, in a thread of its own: a lane keeps the thread that opened it."""
    found: list[float] = []

    def work() -> None:
        spans = place.bench.spans(point)
        wall, cpu = [], []
        place.step(spans)
        for _ in range(_REPEATS):
            begin, thread = time.perf_counter(), time.thread_time()
            place.step(spans)
            wall.append(time.perf_counter() - begin)
            cpu.append(time.thread_time() - thread)
        found.append(believed(wall, cpu if place.bench.device.type == "cpu" else None)[0])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if not found:
        raise RuntimeError("a step on the lane failed")
    return found[0]


def _beside(place: _Place, point: Point, busy: _Place, load: Point) -> float:
    """:func:`_timed` while ``busy`` runs ``load`` over and over.

    :raises RuntimeError: a step of either failed
    """
    stop, started = threading.Event(), threading.Event()
    failed: list[Exception] = []

    def work() -> None:
        try:
            spans = busy.bench.spans(load)
            while not stop.is_set():
                busy.step(spans)
                started.set()
        except Exception as error:  # else ``point`` would pass for undisturbed by a neighbour that was not there
            failed.append(error)
            started.set()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    try:
        seconds = _timed(place, point)
    finally:
        stop.set()
        thread.join()
    if failed:
        raise RuntimeError("a step on the lane beside it failed") from failed[0]
    return seconds


def measure_share(
    model: Llama,
    device: Device,
    space: Space,
    size: int,
    *,
    eager: bool = False,
    make: Callable[[], Capturer] | None = None,
) -> dict[str, float]:
    """Factors of the share of ``size`` units against the whole device, and the slow-downs of running side by side.

    :param eager: without graphs, and ``make``: who captures them, as :class:`Bench`
    :return: ``prefill``, ``decode`` (time ÷ that of the whole device), ``corun_prefill``, ``corun_decode`` (time beside
        the other phase on the rest ÷ alone), ``guard`` (worst of the latter)
    :raises SlalomError: the device cannot be cut there
    """
    prompt = Point("prefill", n=min(256, space.max_tokens), prompts=1)
    context = min(256, space.max_context)
    decodes = [Point("decode", bs=b, ctx=context) for b in sorted({1, min(8, space.max_batch)})]
    room = max(p.tokens + 16 * (p.bs + 1) for p in (prompt, *decodes)) + 64
    sizes = [*sorted({size, device.total - size}), device.total]  # a partition is named by the units of its decode
    to_decode, to_prefill = sizes.index(size), sizes.index(device.total - size)
    benches: list[Bench] = []
    try:
        for _ in range(2):
            benches.append(Bench(model, kv_tokens=room, device=device, sizes=sizes, eager=eager, make=make))
        first, second = benches
        full = {p: _timed(_Place(first, int(p.prompts == 0)), p) for p in (prompt, *decodes)}
        prefill = _timed(_Place(first, 0, to_prefill), prompt)
        decode = {p: _timed(_Place(first, 1, to_decode), p) for p in decodes}
        beside = _beside(_Place(first, 0, to_prefill), prompt, _Place(second, 1, to_prefill), decodes[-1])
        busy = _Place(second, 0, to_decode)
        slowed = [_beside(_Place(first, 1, to_decode), p, busy, prompt) / decode[p] for p in decodes]
    finally:
        for bench in benches:
            bench.close()
    return {
        "prefill": prefill / full[prompt],
        "decode": statistics.median(decode[p] / full[p] for p in decodes),
        "corun_prefill": max(beside / prefill, 1.0),
        "corun_decode": max(statistics.median(slowed), 1.0),
        "guard": max(*slowed, 1.0),
    }
