"""Steps as CUDA graphs: those of one lane on one partition, by kind and size of the step. Not yet verified on GPU.

A step of an 8B model is some 300 launches, and the host needs longer for them than the device for a decode step or a
short chunk; a replay is one launch. A graph runs on the SMs of the stream it was captured on, whatever stream replays
it (CUDA programming guide, 4.6.5), and on static inputs. So a set of graphs belongs to one lane of one partition, which
has its stream and its inputs to itself: what the other lane of the instance runs meanwhile, it runs on its own.

A decode step of n sequences replays the smallest bucket that holds them; what is missing is padding, which writes no
KV. A step with prompts in it, of whatever length, is a chunk: its graph ends after the last layer, since only some of
its rows sample. What has no graph (long prompts, slices of layers) runs without; :meth:`LaneGraphs.reason` says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from engine.errors import SlalomError
from engine.kernels import Batch, Span, Spans
from engine.kernels.static import StaticBatch
from engine.lanes.base import Lane
from engine.model.llama import Carry
from engine.model.runner import ModelRunner

_log = logging.getLogger("slalom.graphs")
#: Sequences of a decode step, and rows of a step with prompts, that graphs are captured for. Up to some 190 rows
#: padding is nearly free: a step reads the weights for longer than it multiplies by them. Beyond some 400 the device is
#: busy for longer than the host needs to launch (docs/gpu.md).
DECODES = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)
CHUNKS = (16, 32, 64, 128, 192, 256, 320, 384)
T = TypeVar("T")


def decode_buckets(max_batch: int) -> list[int]:
    """Sizes for an instance that decodes at most ``max_batch`` sequences: none above."""
    most = min(max_batch, DECODES[-1])
    return sorted({most, *(bucket for bucket in DECODES if bucket < most)})


class Capturer(Protocol):
    """How a function's launches are written down."""

    def capture(self, lane: Lane, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """A function that launches again what ``function`` launched, and the tensors in which its result appears."""
        ...

    def held_bytes(self) -> int:
        """Device memory held by this process."""
        ...


class CudaCapturer:
    """:class:`Capturer` of a CUDA device. Its graphs share their memory, so only one of them may run at a time."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._pool: Any = None

    def capture(self, lane: Lane, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
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


class Replay(NamedTuple):
    """What a replayed step gives, valid until the next replay of its set.

    :param carry: what the last layer returned, of a chunk; ``logits`` [S, vocab], of a decode step
    """

    batch: Batch
    carry: Carry | None
    logits: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    static: StaticBatch
    replay: Callable[[], None]
    result: Any  # logits, or what a Carry is made of


class LaneGraphs:
    """The graphs of one lane of one instance on one partition. All of them end together, see :meth:`close`.

    :param width: KV blocks of the longest sequence a replay may hold
    :param decodes: sizes of decode steps, and ``chunks`` rows of steps with prompts, that are captured
    :param sequences: most sequences of a step with prompts
    :param most_bytes: once the set takes more memory, no further graph is captured
    :param replayable: whether what the kernels launch can be replayed; as they say if not given
    :raises SlalomError: a capture failed
    :ivar missing: why there is no graph, by kind (decodes?) and size
    """

    def __init__(
        self,
        runner: ModelRunner,
        lane: Lane,
        capturer: Capturer,
        *,
        width: int,
        decodes: Sequence[int] = DECODES,
        chunks: Sequence[int] = CHUNKS,
        sequences: int = 256,
        most_bytes: int = 4 << 30,
        replayable: bool | None = None,
    ) -> None:
        self.runner, self.lane, self.width, self.sequences = runner, lane, width, sequences
        self.missing: dict[tuple[bool, int], str] = {}
        self._graphs: dict[tuple[bool, int], _Captured] = {}
        self._sizes = {True: sorted(decodes), False: sorted(chunks)}
        kernels, before = runner.model.kernels, capturer.held_bytes()
        wanted = [(kind, size) for kind in (False, True) for size in reversed(self._sizes[kind])]
        for key in wanted:  # the largest first: the others fit into its memory
            taken = capturer.held_bytes() - before
            if not (kernels.replayable if replayable is None else replayable):
                self.missing[key] = f"{kernels.name} kernels read lengths on the host"
            elif taken > most_bytes:
                self.missing[key] = f"{taken >> 20} MiB of memory taken, {most_bytes >> 20} allowed"
            else:
                self._graphs[key] = self._captured(*key, capturer)

    def _captured(self, decodes: bool, size: int, capturer: Capturer) -> _Captured:
        runner, config = self.runner, self.runner.model.config
        heads, weights = (config.n_heads, config.n_kv_heads, config.head_dim), runner.model.embed.weight
        static = StaticBatch(
            rows=size, sequences=size if decodes else min(size, self.sequences), decodes=decodes, width=self.width,
            block_tokens=runner.pool.block_tokens, device=runner.device, sm_count=self.lane.size,
            tiling=runner.model.kernels.tiling(
                1 if decodes else size, heads, weights.dtype.itemsize, self.lane.size
            ),
        )  # fmt: skip

        @torch.inference_mode()
        def forward() -> Any:
            carry = runner.model(static.batch, runner.pool)
            return runner.model.logits(carry, static.batch) if decodes else (carry.hidden, carry.residual)

        try:
            return _Captured(static, *capturer.capture(self.lane, forward))
        except Exception as error:
            what = f"{'decode step' if decodes else 'step'} of {size} {'sequences' if decodes else 'rows'}"
            fix = f"cannot be captured ({error}); free memory or take fewer KV tokens, or run without graphs: --eager"
            raise SlalomError("CUDA graph", what, fix) from error

    def _key(self, spans: Spans) -> tuple[bool, int] | None:
        decodes = spans.decodes
        if spans.width > self.width or not (decodes or len(spans) <= self.sequences):
            return None
        rows = len(spans.tokens)
        return next(((decodes, b) for b in self._sizes[decodes] if b >= rows and (decodes, b) in self._graphs), None)

    def reason(self, spans: Spans | Sequence[Span]) -> str:
        """Why :meth:`replay` has no graph for ``spans``."""
        spans = Spans.of(spans)
        decodes, rows = spans.decodes, len(spans.tokens)
        if spans.width > self.width:
            return f"a sequence of more than {self.width} blocks"
        if not decodes and len(spans) > self.sequences:
            return f"a step with prompts of more than {self.sequences} sequences"
        fitting = [size for size in self._sizes[decodes] if size >= rows]
        if fitting:
            return self.missing[decodes, fitting[0]]
        kind, unit = ("a decode step", "sequences") if decodes else ("a step with prompts", "rows")
        most = self._sizes[decodes][-1:]
        return f"{kind} of more than {most[0]} {unit}" if most else f"{kind} on this lane"

    @torch.inference_mode()
    def replay(self, spans: Spans | Sequence[Span]) -> Replay | None:
        """Run all layers of ``spans`` by a graph, within the lane; None where there is none."""
        spans = Spans.of(spans)
        key = self._key(spans)
        if key is None:
            return None
        captured = self._graphs[key]
        batch = captured.static.fill(spans)
        captured.replay()
        if spans.decodes:
            return Replay(batch, None, captured.result[: len(spans)])
        hidden, residual = captured.result
        return Replay(batch, Carry(hidden, residual, self.runner.n_layers), None)

    def close(self) -> None:
        """Let go of all graphs, before the lane's stream and context go.

        Together, and only here: from torch 2.12 on the end of a graph clears the cuBLAS workspace of its stream, which
        the other graphs of the set still use (pytorch#193402).
        """
        self.lane.wait()
        self._graphs.clear()
