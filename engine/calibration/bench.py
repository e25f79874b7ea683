"""Time single steps of a model by what serves: an executor with its lanes, streams and graphs; and say when the machine
was not quiet.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from engine.calibration.points import Measured, Point
from engine.kernels import Span, Spans
from engine.lanes.base import WHOLE, Device
from engine.lanes.partitions import Lanes, make_device
from engine.live.graphs import Capturer
from engine.live.hosts import GraphSizes, LocalHost
from engine.model.kv import KVPool
from engine.model.llama import Carry, Llama
from engine.model.runner import ModelRunner
from engine.model.sampling import SamplingParams

_BLOCK = 16
#: A repeat that takes this much longer by the wall than by its thread's clock was interrupted.
QUIET = 1.04
_GREEDY = SamplingParams(temperature=0.0)


def believed(wall: Sequence[float], cpu: Sequence[float] | None) -> tuple[float, bool]:
    """(seconds, busy): the median of the undisturbed repeats.

    On a CPU a step computes in one thread and waits for nothing, so on a quiet machine wall and thread time are
    equal. Where they part for most repeats, thread time is the better guess of what a quiet machine would take,
    and the point is marked.
    """
    if cpu is None:
        return statistics.median(wall), False
    quiet = [w for w, c in zip(wall, cpu, strict=True) if w <= QUIET * c]
    if len(quiet) >= 2:
        return statistics.median(quiet), False
    return statistics.median(cpu), True


class Bench:
    """An instance of its own, which nobody else uses. To be closed.

    :param kv_tokens: of the pool that steps run on; a point that needs more fails
    :param max_batch: sequences of the largest decode step that is replayed from a graph
    :param repeats: least number of timed runs of a point; as many more until they agree, at most three times that
    :param eager: launch every kernel by the host, also on a GPU
    :param device: to cut the instance's lanes from, not closed with it; one of its own if not given
    :param sizes: units of the partitions, as :class:`engine.lanes.partitions.Lanes`; the whole device if not given
    :param make: captures graphs, see :class:`engine.live.hosts.LocalHost`; a CPU has none without
    :raises SlalomError: the device cannot be cut there, or a graph cannot be captured
    """

    def __init__(
        self,
        model: Llama,
        *,
        kv_tokens: int,
        max_batch: int = 8,
        repeats: int = 4,
        agree: float = 0.02,
        eager: bool = False,
        device: Device | None = None,
        sizes: Sequence[int] = (),
        make: Callable[[], Capturer] | None = None,
    ) -> None:
        weights = model.embed.weight
        self.model, self.device = model, weights.device
        self.kv_tokens = kv_tokens // _BLOCK * _BLOCK
        self._pool = KVPool(
            model.config, blocks=self.kv_tokens // _BLOCK, block_tokens=_BLOCK, dtype=weights.dtype, device=self.device
        )
        self.runner = ModelRunner(model, self._pool)
        whole = device or make_device(self.device.type, self.device.index or 0)
        if weights.is_cuda:
            self.runner.warm(whole.total)
        graphs = GraphSizes(self.kv_tokens, max_batch, 256) if not eager and (weights.is_cuda or make) else None
        lanes, closes = Lanes(whole, sizes or [whole.total]), _Lent() if device is not None else whole
        self.host = LocalHost(self.runner, closes, lanes, graphs, make)
        self._executors = self.host.executor(0), self.host.executor(1)
        self._repeats, self._agree = repeats, agree

    def close(self) -> None:
        """Give graphs, lanes and memory back."""
        self.host.close()

    def spans(self, point: Point) -> Spans:
        """The sequences of a point, each on blocks of its own."""
        found, block = list[Span](), 0
        for new, start, count in ((point.n, point.r, point.prompts), (1, point.ctx, point.bs)):
            each = -(-(new + start) // _BLOCK)
            for _ in range(count):
                found.append(Span([1] * new, start, range(block, block + each)))
                block += each
        if block > self._pool.blocks:
            raise MemoryError(f"needs {block * _BLOCK} tokens of KV, {self.kv_tokens} are there")
        return replace(Spans.of(found), prompts=point.prompts)

    def step(self, spans: Spans, l: int = 0, partition: int = WHOLE) -> None:
        """One step as a lane runs it, down to the tokens on the host.

        :param l: which lane; 0 runs prompts and, on the whole device, decodes as well (a MIXED instance)
        """
        layers, n = (0, self.runner.n_layers), len(spans)
        self._executors[l].run(spans, layers, [_GREEDY] * n, [0] * n, partition)

    def measure(self, point: Point) -> Measured:
        """Time ``point``; what goes wrong is part of the result."""
        try:
            spans = self.spans(point)
            self.step(spans)  # the first one compiles, allocates, or fills caches
            wall, cpu = self._timed(spans)
        except Exception as error:  # out of memory, a kernel that refuses a shape: the next point may do
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            return Measured(point, failed=f"{type(error).__name__}: {error}"[:200])
        on_cpu = self.device.type == "cpu"
        seconds, busy = believed(wall, cpu if on_cpu else None)
        middle = statistics.median(wall)
        low, high = np.percentile(wall, (25, 75))
        spread = float(high - low) / middle
        thread = statistics.median(cpu) if on_cpu else 0.0
        return Measured(point, seconds, middle, thread, spread, len(wall), busy)

    def _timed(self, spans: Spans) -> tuple[list[float], list[float]]:
        wall: list[float] = []
        cpu: list[float] = []
        with no_collection():
            while len(wall) < 3 * self._repeats:
                begin, thread = time.perf_counter(), time.thread_time()
                self.step(spans)
                wall.append(time.perf_counter() - begin)
                cpu.append(time.thread_time() - thread)
                used = cpu if self.device.type == "cpu" else wall
                if len(wall) >= self._repeats:
                    low, high = np.percentile(used, (25, 75))
                    if high - low <= self._agree * statistics.median(used):
                        break
        return wall, cpu


class _Lent:
    """A device that somebody else closes."""

    def close(self) -> None:
        return


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector out of what is timed."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def warm_up(model: Llama, rows: int, sequences: int) -> None:
    """Meet every shape once: libraries choose, compile or cache a kernel per number of rows at first sight.

    One layer stands for all, since they are alike; so a few hundred shapes take a second or two.

    :param rows: most tokens of one step
    :param sequences: most sequences that sample in one step
    """
    weights = model.embed.weight
    pool = KVPool(model.config, blocks=max(-(-rows // _BLOCK) + 1, sequences), block_tokens=_BLOCK, dtype=weights.dtype,
                  device=weights.device)  # fmt: skip
    runner = ModelRunner(model, pool)
    with torch.inference_mode():
        for n in range(1, rows + 1):
            batch = runner.batch([Span([1] * n, 0, range(pool.blocks))])
            runner.run_layers(batch, (0, 1))
        hidden = torch.zeros((sequences, model.config.width), dtype=weights.dtype, device=weights.device)
        for n in range(1, min(sequences, pool.blocks) + 1):
            batch = runner.batch([Span([1], 0, [k]) for k in range(n)])
            model.logits(Carry(hidden[:n], hidden[:n], runner.n_layers), batch)


def roofline(model: Llama) -> tuple[float, float]:
    """(FLOP/s, bytes/s) that this device reaches on large products and on copying: best of several.

    What it gives is the least a step can take, so it is measured generously: a profile is refused below it.
    """
    weights = model.embed.weight
    size = 1024 if weights.device.type == "cpu" else 8192
    a = torch.ones((size, size), dtype=weights.dtype, device=weights.device)
    big = [torch.ones_like(weights) for _ in range(4)]
    read = sum(x.numel() * x.element_size() for x in big)

    def best(work: Callable[[], object], times: int = 8) -> float:
        seconds = []
        for _ in range(times):
            begin = time.perf_counter()
            work()
            if weights.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        return min(seconds)

    with torch.inference_mode():
        flops = 2.0 * size**3 / best(lambda: a @ a)
        into = [torch.empty_like(x) for x in big]
        copied = best(lambda: [x.copy_(y) for x, y in zip(into, big, strict=True)])
    return flops, 2.0 * read / copied
