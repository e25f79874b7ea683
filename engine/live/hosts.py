"""Where instances run: an :class:`Executor` for each lane, and here those of this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from engine.core.state import ClusterState
from engine.kernels import Batch, Scored, Spans
from engine.lanes.base import WHOLE, Device, Lane
from engine.lanes.partitions import Lanes, lanes_of, make_device, partition_of
from engine.live.graphs import CHUNKS, Capturer, CudaCapturer, LaneGraphs, Replay, decode_buckets
from engine.model.kv import KVPool
from engine.model.llama import Carry, Llama
from engine.model.runner import ModelRunner
from engine.model.sampling import Logprobs, SamplingParams, logprobs_of


class InstanceLost(RuntimeError):
    """The thread or process that runs an instance is gone; what it was doing is recomputed elsewhere."""


class Executor(Protocol):
    """Runs the steps of one lane, one after the other, wherever the weights are.

    :ivar logprobs: of the last step's tokens, one for each; empty where nobody asked
    :ivar prompt_logprobs: for each :class:`engine.kernels.Scored` of its spans, of the tokens that it names
    """

    n_layers: int
    logprobs: Sequence[Logprobs | None]
    prompt_logprobs: Sequence[Sequence[Logprobs]]

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
    scored: Sequence[Scored]


class LocalExecutor:
    """An :class:`Executor` in this process.

    :param lanes: of its instance; ``l`` is which of its two lanes this is
    :param graphs: of this lane, by partition: never those of the other lane, which may be running
    :ivar without_graph: whole steps run without a graph where graphs were asked for, by reason
    """

    def __init__(
        self, runner: ModelRunner, lanes: Lanes, l: int, graphs: Mapping[int, LaneGraphs] | None = None
    ) -> None:
        self._runner, self.n_layers = runner, runner.n_layers
        self._lanes, self._l, self._graphs = lanes, l, graphs or {}
        self.logprobs: Sequence[Logprobs | None] = ()
        self.prompt_logprobs: Sequence[Sequence[Logprobs]] = ()
        self._on: Lane | None = None  # where the step before ran
        self._passes: list[_Pass | None] = []  # under way; None: a slice of it failed
        self.without_graph: Counter[str] = Counter()

    def close(self) -> None:
        """Let go of its graphs; nothing runs here any more."""
        for graphs in self._graphs.values():
            graphs.close()

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
        aside, self.logprobs, self.prompt_logprobs = len(self._passes) - (0 if spans else 1), (), ()
        try:
            with lane.open():
                if self._on is None:
                    lane.catch_up()
                elif self._on is not lane:
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
            whole = layers == (0, self.n_layers) and not spans.scored  # graphs keep what is sampled, no more
            replay = self._replay(spans, partition) if whole else None
            if replay is not None:
                if replay.logits is not None:
                    return self._choose(replay.logits, params, steps)
                assert replay.carry is not None
                return self._choose(self._runner.logits(replay.batch, replay.carry), params, steps) if params else None
            batch, carry, scored = self._runner.batch(spans, sm_count=lane.size), None, spans.scored
        else:
            begun = self._passes.pop() if self._passes else None
            if begun is None:
                raise RuntimeError("the slice of layers before this one failed")
            batch, carry, scored = begun.batch, begun.carry, begun.scored
            if begun.lane is not lane:
                lane.keep(carry.hidden, carry.residual)
        carry = self._runner.run_layers(batch, layers, carry)
        if layers[1] < self.n_layers:
            self._passes.append(_Pass(batch, carry, lane, scored))
            return None
        self.prompt_logprobs = [self._runner.logprobs(batch, carry, wanted) for wanted in scored]
        return self._choose(self._runner.logits(batch, carry), params, steps) if params else None

    def _choose(self, logits: Tensor, params: Sequence[SamplingParams], steps: Sequence[int]) -> Tensor:
        tokens = self._runner.choose(logits, params, steps)
        if any(p.logprobs is not None for p in params):
            self.logprobs = logprobs_of(logits, tokens, [p.logprobs for p in params])
        return tokens

    def _replay(self, spans: Spans, partition: int) -> Replay | None:
        """A whole step by a graph; None when it must run without."""
        graphs = self._graphs.get(partition)
        found = graphs.replay(spans) if graphs is not None else None
        if graphs is not None and found is None:
            self.without_graph[graphs.reason(spans)] += 1
        return found


class GraphSizes(NamedTuple):
    """What graphs of an instance must hold.

    :param tokens: of the longest sequence
    :param max_batch: sequences that decode together
    :param sequences: of a step with prompts
    """

    tokens: int
    max_batch: int
    sequences: int

    @classmethod
    def of(cls, state: ClusterState, max_tokens: int | None = None) -> GraphSizes:
        """What the instances of ``state`` may run.

        :param max_tokens: of the longest request; what the pools hold if not given
        """
        size, most = int(state.cluster[0]["block_tokens"]), state.run.shape[1]
        longest = max(int(p["n_blocks"]) for p in state.pool) * size
        return cls(min(max_tokens or longest, longest), most, most + state.prefills.shape[1])


class Closes(Protocol):
    """What is given back in the end."""

    def close(self) -> None:
        """Give it back."""
        ...


class _Shared:
    """A device that several hosts use: it is closed when the last of them is."""

    def __init__(self, device: Device, users: int) -> None:
        self._device, self._users = device, users

    def close(self) -> None:
        self._users -= 1
        if self._users == 0:
            self._device.close()


class LocalHost:
    """A :class:`Host` in this process.

    :param device: what ``lanes`` were cut from, closed with this host
    :param graphs: what its graphs must hold; None: every launch by the host
    :param make: a capturer for each lane, which runs one step at a time; two lanes do so at once
    :raises SlalomError: a graph cannot be captured
    """

    def __init__(
        self,
        runner: ModelRunner,
        device: Closes,
        lanes: Lanes,
        graphs: GraphSizes | None = None,
        make: Callable[[], Capturer] | None = None,
    ) -> None:
        self.runner, self.lanes = runner, lanes
        self._device = device
        self.graphs: tuple[dict[int, LaneGraphs], dict[int, LaneGraphs]] = ({}, {})
        if graphs is not None:
            make = make or (lambda: CudaCapturer(runner.device.index or 0))
            for l in (0, 1):
                self.graphs[l].update(lane_graphs(runner, lanes, l, graphs, make()))

    @property
    def pool(self) -> KVPool:
        """Its KV pool."""
        return self.runner.pool

    def executor(self, l: int) -> LocalExecutor:
        """See :class:`Host`."""
        return LocalExecutor(self.runner, self.lanes, l, self.graphs[l])

    def watch(self, gone: Callable[[Exception], None]) -> None:
        """See :class:`Host`. This process hears of its own end from its lanes."""

    def close(self) -> None:
        """See :class:`Host`. Graphs first: they were captured on streams of the device."""
        for graphs in (*self.graphs[0].values(), *self.graphs[1].values()):
            graphs.close()
        self._device.close()


def lane_graphs(
    runner: ModelRunner, lanes: Lanes, l: int, sizes: GraphSizes, capturer: Capturer
) -> Iterator[tuple[int, LaneGraphs]]:
    """The graphs of lane ``l`` by partition.

    Lane 0 computes prompts, and the decodes of a MIXED instance with them, on the whole device; lane 1 decodes.
    """
    width = -(-sizes.tokens // runner.pool.block_tokens)
    for k in (WHOLE, *range(len(lanes.partitions))):
        decodes = decode_buckets(sizes.max_batch) if l == 1 or k == WHOLE else ()
        lane = lanes.lane(l, k)
        yield k, LaneGraphs(
            runner, lane, capturer, width=width, decodes=decodes, chunks=CHUNKS if l == 0 else (),
            sequences=sizes.sequences,
        )  # fmt: skip


def local_hosts(
    model: Llama,
    state: ClusterState,
    eos_ids: frozenset[int],
    max_tokens: int | None = None,
    *,
    eager: bool = False,
    make: Callable[[], Capturer] | None = None,
) -> list[LocalHost]:
    """A host in this process for each instance of ``state``, with the KV pools that it describes.

    :param max_tokens: of the longest request, for the graphs of a GPU; what the pools hold if not given
    :param eager: no graphs on a GPU
    :param make: captures graphs of a lane, see :class:`LocalHost`; a CPU has none without
    :raises SlalomError: the device cannot be cut as the profile says, or a graph cannot be captured
    """
    size, weights = int(state.cluster[0]["block_tokens"]), model.embed.weight
    device = make_device(weights.device.type, weights.device.index or 0)
    lanes = lanes_of(state, device)
    pools = [
        KVPool(model.config, blocks=int(p["n_blocks"]), block_tokens=size, dtype=weights.dtype, device=weights.device)
        for p in state.pool
    ]
    runners = [ModelRunner(model, pools[i["pool"]], eos_ids=eos_ids) for i in state.inst]
    if weights.is_cuda:
        runners[0].warm(device.total)
    wanted = GraphSizes.of(state, max_tokens) if (weights.is_cuda or make is not None) and not eager else None
    shared = _Shared(device, len(runners))
    return [LocalHost(runner, shared, own, wanted, make) for runner, own in zip(runners, lanes, strict=True)]
