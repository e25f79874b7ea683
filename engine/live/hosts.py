"""Where instances run: an :class:`Executor` for each lane, and here those of this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from engine.core.state import ClusterState
from engine.kernels import Batch, Spans
from engine.lanes.base import WHOLE, Device, Lane
from engine.lanes.partitions import Lanes, lanes_of, make_device, partition_of
from engine.live.graphs import DecodeGraphs, graphs_of
from engine.model.kv import KVPool
from engine.model.llama import Carry, Llama
from engine.model.runner import ModelRunner
from engine.model.sampling import Logprobs, SamplingParams, logprobs_of

__all__ = ["Executor", "Host", "InstanceLost", "LocalExecutor", "LocalHost", "local_hosts"]


class InstanceLost(RuntimeError):
    """The thread or process that runs an instance is gone; what it was doing is recomputed elsewhere."""


class Executor(Protocol):
    """Runs the steps of one lane, one after the other, wherever the weights are.

    :ivar logprobs: of the last step's tokens, one for each; empty where nobody asked
    """

    n_layers: int
    logprobs: Sequence[Logprobs | None]

    def partition(self, state: ClusterState, i: int, l: int) -> int:
        """Which partition of the device the step in lane (i, l) runs on; asked when the step starts."""
        ...

    def run(
        self,
        spans: Spans | None,
        layers: tuple[int, int],
        params: Sequence[SamplingParams],
        steps: Sequence[int],
        partition: int,
    ) -> list[int]:
        """Run ``layers`` of the sequences ``spans``, or, where that is None, of those of the slice before.

        Sequences whose last layers are still to come stand aside, half computed, when others begin: last begun goes on.

        :param params: of the sampling sequences, and ``steps`` how many tokens each of them has so far; empty unless
            the last layer is among ``layers``
        :return: their next tokens
        :raises InstanceLost: nothing will ever run here again
        """
        ...


class Host(Protocol):
    """Where the steps of one instance run, and its KV is."""

    @property
    def pool(self) -> Any:
        """What stands for its KV pool in a :class:`engine.live.transfer.Transfer`."""
        ...

    def executor(self, l: int) -> Executor:
        """That of lane ``l``."""
        ...

    def watch(self, gone: Callable[[Exception], None]) -> None:
        """Call ``gone``, from any thread, as soon as it is clear that nothing will ever run here again."""
        ...

    def close(self) -> None:
        """Give back what the device lent; no lane is used any more."""
        ...


class _Pass(NamedTuple):
    """A forward pass whose last layers are still to come, and where it ran."""

    batch: Batch
    carry: Carry
    lane: Lane


class LocalExecutor:
    """An :class:`Executor` in this process.

    :param lanes: of its instance; ``l`` is which of its two lanes this is
    :param graphs: decode graphs of its instance, by partition
    :ivar without_graph: decode steps run without a graph where graphs were asked for, by reason
    """

    def __init__(
        self, runner: ModelRunner, lanes: Lanes, l: int, graphs: Mapping[int, DecodeGraphs] | None = None
    ) -> None:
        self._runner, self.n_layers = runner, runner.n_layers
        self._lanes, self._l, self._graphs = lanes, l, graphs or {}
        self.logprobs: Sequence[Logprobs | None] = ()
        self._on: Lane | None = None  # where the step before ran
        self._passes: list[_Pass | None] = []  # under way; None: a slice of it failed
        self.without_graph: Counter[str] = Counter()

    def partition(self, state: ClusterState, i: int, l: int) -> int:
        """See :class:`Executor`."""
        return partition_of(state, self._lanes, i, l)

    def run(
        self,
        spans: Spans | None,
        layers: tuple[int, int],
        params: Sequence[SamplingParams],
        steps: Sequence[int],
        partition: int = WHOLE,
    ) -> list[int]:
        """See :class:`Executor`."""
        lane = self._lanes.lane(self._l, partition)
        aside, self.logprobs = len(self._passes) - (0 if spans else 1), ()
        try:
            with lane.open():
                if self._on is not None and self._on is not lane:
                    lane.follow(self._on)  # the partition has changed: no drain, the device waits by itself
                self._on = lane
                sampled = self._run(spans, layers, params, steps, partition, lane)
                tokens: list[int] = [] if sampled is None else sampled.tolist()
                lane.wait()
            return tokens
        except BaseException:
            del self._passes[aside:]
            if layers[1] < self.n_layers:
                self._passes.append(None)
            raise

    def _run(
        self,
        spans: Spans | None,
        layers: tuple[int, int],
        params: Sequence[SamplingParams],
        steps: Sequence[int],
        partition: int,
        lane: Lane,
    ) -> Tensor | None:
        if spans is not None:
            logits = self._replay(spans, len(params), partition)
            if logits is not None:
                return self._choose(logits, params, steps)
            batch, carry = self._runner.batch(spans, sm_count=lane.size), None
        else:
            begun = self._passes.pop() if self._passes else None
            if begun is None:
                raise RuntimeError("the slice of layers before this one failed")
            batch, carry = begun.batch, begun.carry
            if begun.lane is not lane:
                lane.keep(carry.hidden, carry.residual)
        carry = self._runner.run_layers(batch, layers, carry)
        if layers[1] < self.n_layers:
            self._passes.append(_Pass(batch, carry, lane))
            return None
        return self._choose(self._runner.logits(batch, carry), params, steps) if params else None

    def _choose(self, logits: Tensor, params: Sequence[SamplingParams], steps: Sequence[int]) -> Tensor:
        tokens = self._runner.choose(logits, params, steps)
        if any(p.logprobs is not None for p in params):
            self.logprobs = logprobs_of(logits, tokens, params)
        return tokens

    def _replay(self, spans: Spans, n_sampling: int, partition: int) -> Tensor | None:
        """Logits of a decode step by a graph; None when it must run without."""
        graphs = self._graphs.get(partition)
        if graphs is None or n_sampling != len(spans) or not spans.decodes:
            return None
        bucket = graphs.bucket(spans)
        if bucket is None:
            self.without_graph[graphs.reason(spans)] += 1
            return None
        return graphs.logits(bucket, spans)


class LocalHost:
    """A :class:`Host` in this process."""

    def __init__(
        self, runner: ModelRunner, device: Device, lanes: Lanes, graphs: Mapping[int, DecodeGraphs] | None = None
    ) -> None:
        self.runner, self.lanes = runner, lanes
        self._device, self._graphs = device, graphs

    @property
    def pool(self) -> KVPool:
        """Its KV pool."""
        return self.runner.pool

    def executor(self, l: int) -> LocalExecutor:
        """See :class:`Host`."""
        return LocalExecutor(self.runner, self.lanes, l, self._graphs)

    def watch(self, gone: Callable[[Exception], None]) -> None:
        """See :class:`Host`. This process hears of its own end from its lanes."""

    def close(self) -> None:
        """See :class:`Host`."""
        self._device.close()


def local_hosts(
    model: Llama, state: ClusterState, eos_ids: frozenset[int], max_tokens: int | None = None
) -> list[LocalHost]:
    """A host in this process for each instance of ``state``, with the KV pools that it describes.

    :param max_tokens: of the longest request, for the decode graphs of a GPU; what the pools hold if not given
    :raises SlalomError: the device cannot be cut as the profile says
    """
    size, weights = int(state.cluster[0]["block_tokens"]), model.embed.weight
    device = make_device(weights.device.type, weights.device.index or 0)
    lanes = lanes_of(state, device)
    pools = [
        KVPool(model.config, blocks=int(p["n_blocks"]), block_tokens=size, dtype=weights.dtype, device=weights.device)
        for p in state.pool
    ]
    runners = [ModelRunner(model, pools[i["pool"]], eos_ids=eos_ids) for i in state.inst]
    graphs: Sequence[Mapping[int, DecodeGraphs] | None] = [None] * len(runners)
    if weights.is_cuda:
        longest = max_tokens or max(int(p["n_blocks"]) for p in state.pool) * size
        graphs = graphs_of(runners, lanes, -(-longest // size))
    return [LocalHost(*parts) for parts in zip(runners, [device] * len(runners), lanes, graphs, strict=True)]
