"""Decode steps as CUDA graphs, one for each batch bucket of one lane. Not yet verified on GPU.

A graph runs on the SMs of the stream it was captured on, whatever stream replays it (CUDA programming guide, 4.6.5),
so every partition has its own set, captured on its decode lane. A step of n sequences replays the smallest bucket
that holds them; the rest of the bucket is padding, which writes no KV. Where no graph can be had the step runs
without, and :attr:`DecodeGraphs.missing` says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.kernels import Batch, Span, Spans
from engine.lanes.base import WHOLE, Lane
from engine.lanes.partitions import Lanes
from engine.model.runner import ModelRunner

__all__ = ["BUCKETS", "Capturer", "CudaCapturer", "DecodeGraphs", "graphs_of"]

_log = logging.getLogger("slalom.graphs")
#: Batch sizes that graphs are captured for, unless told otherwise.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: Kernels that never read a tensor back to the host, so that what they launch can be replayed.
_REPLAYABLE = ("triton",)


class Capturer(Protocol):
    """How a function's launches are written down."""

    def capture(self, lane: Lane, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """A function that launches again what ``function`` launched, and the tensor in which its result appears."""
        ...

    def held_bytes(self) -> int:
        """Device memory held by this process."""
        ...


class CudaCapturer:
    """:class:`Capturer` of a CUDA device. Its graphs share their memory, so only one of them may run at a time."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._pool: Any = None

    def capture(self, lane: Lane, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        stream: Any = getattr(lane, "stream")  # noqa: B009  (a lane of a GPU has one)
        torch.cuda.synchronize(self._index)  # weights, KV and static inputs were made on another stream
        with lane.open():
            function()  # outside the graph: kernels are compiled and libraries get their workspaces
        lane.wait()
        graph = torch.cuda.CUDAGraph()
        # other threads may go on with what they do on the device: only this one is capturing
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            result = function()
        self._pool = self._pool or graph.pool()
        return graph.replay, result

    def held_bytes(self) -> int:
        return int(torch.cuda.memory_reserved(self._index))


class DecodeGraphs:
    """The graphs of one instance on one lane.

    :param width: KV blocks of the longest sequence a replay may hold
    :param most_bytes: bound of the memory that all graphs of this set take together
    :ivar missing: why there is no graph, by bucket
    """

    def __init__(
        self,
        runner: ModelRunner,
        lane: Lane,
        capturer: Capturer,
        *,
        width: int,
        buckets: Sequence[int] = BUCKETS,
        most_bytes: int = 4 << 30,
        replayable: Sequence[str] = _REPLAYABLE,
    ) -> None:
        self.runner, self.lane, self.width = runner, lane, width
        self.missing: dict[int, str] = {}
        self._graphs: dict[int, tuple[Batch, Callable[[], None], Tensor]] = {}
        self.buckets = sorted(buckets)
        kernels = runner.model.kernels.name
        before = capturer.held_bytes()
        for bucket in reversed(self.buckets):  # the largest first: the others fit into its memory
            if kernels not in replayable:
                self.missing[bucket] = f"{kernels} kernels read lengths on the host"
                continue
            self._capture(bucket, capturer, before, most_bytes)

    def _capture(self, bucket: int, capturer: Capturer, before: int, most_bytes: int) -> None:
        static = self._blank(bucket)
        try:
            replay, logits = capturer.capture(self.lane, lambda: self._forward(static))
        except Exception as error:  # out of memory, or something that cannot be captured: said, and done without
            self.missing[bucket] = f"capture failed: {error}"
            _log.warning("no decode graph for %d sequences: %s", bucket, error)
            return
        if (taken := capturer.held_bytes() - before) > most_bytes:
            self.missing[bucket] = f"{taken >> 20} MiB of memory taken, {most_bytes >> 20} allowed"
            return
        self._graphs[bucket] = (static, replay, logits)

    def _blank(self, bucket: int) -> Batch:
        """Static input: all padding."""
        blank = Batch.build(
            [Span([0], 0, [0])],
            block_tokens=self.runner.pool.block_tokens,
            device=self.runner.device,
            sm_count=self.lane.size,
            pad_to=bucket,
            table_width=self.width,
        )
        blank.context_lens.zero_()
        blank.slots.fill_(-1)
        return blank

    def _forward(self, batch: Batch) -> Tensor:
        return self.runner.model.logits(self.runner.model(batch, self.runner.pool), batch)

    def bucket(self, spans: Spans | Sequence[Span]) -> int | None:
        """The bucket whose graph can run ``spans``; None when there is none, see :meth:`reason`."""
        spans = Spans.of(spans)
        if not spans.decodes or spans.width > self.width:
            return None
        return next((b for b in self.buckets if b >= len(spans) and b in self._graphs), None)

    def reason(self, spans: Spans | Sequence[Span]) -> str:
        """Why :meth:`bucket` found none."""
        spans = Spans.of(spans)
        if not spans.decodes:
            return "not a decode step"
        if spans.width > self.width:
            return f"a sequence of more than {self.width} blocks"
        fitting = [b for b in self.buckets if b >= len(spans)]
        return self.missing[fitting[0]] if fitting else f"more than {self.buckets[-1]} sequences"

    @torch.inference_mode()
    def logits(self, bucket: int, spans: Spans | Sequence[Span]) -> Tensor:
        """Logits [len(spans), vocab] of one decode step, replayed within the lane; valid until the next replay."""
        static, replay, logits = self._graphs[bucket]
        # columns beyond a sequence's blocks are never read, so the old ones may stay there
        static.copy_(Batch.build(spans, block_tokens=self.runner.pool.block_tokens, pad_to=bucket))
        replay()
        return logits[: len(spans)]


def graphs_of(
    runners: Sequence[ModelRunner], lanes: Sequence[Lanes], width: int, make: Callable[[], Capturer] | None = None
) -> list[dict[int, DecodeGraphs]]:
    """Decode graphs of every instance, by partition.

    :param width: KV blocks of the longest sequence
    :param make: a capturer for each instance: one decodes one step at a time, two do so at once
    """
    found = []
    for runner, own in zip(runners, lanes, strict=True):
        capturer = make() if make is not None else CudaCapturer(runner.device.index or 0)
        partitions = (WHOLE, *range(len(own.partitions)))
        found.append({k: DecodeGraphs(runner, own.lane(1, k), capturer, width=width) for k in partitions})
    return found
