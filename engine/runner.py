"""From the step written in a lane to tokens: what one lane of one instance runs, and on which part of the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from engine.core import live
from engine.core.state import ClusterState
from engine.graphs import DecodeGraphs
from engine.kernels import Batch, Span
from engine.lanes import WHOLE, Lane, Lanes, partition_of
from engine.model.llama import Carry
from engine.model.runner import ModelRunner
from engine.model.sampling import SamplingParams
from engine.request import Delta, Request

__all__ = ["LaneRunner", "Step", "StepResult"]


class Step(NamedTuple):
    """One forward pass, or a slice of its layers. ``spans`` is empty for a slice after the first."""

    spans: list[Span]
    requests: list[Request]  # one for each span
    layers: tuple[int, int]
    partition: int = WHOLE


class StepResult(NamedTuple):
    """``deltas``: what each sampling request got. ``error``: why there is nothing; its requests cannot go on."""

    deltas: list[tuple[Request, Delta]]
    error: Exception | None = None


class LaneRunner:
    """Writes steps down in the loop's thread and runs them in the lane's, one after the other.

    :param requests: by slot; shared with whoever admits them
    :param width: blocks of the longest request
    :param lanes: of its instance; ``l`` is which of its two lanes this is
    :param graphs: decode graphs of its instance, by partition
    :ivar without_graph: decode steps run without a graph where graphs were asked for, by reason
    """

    def __init__(
        self,
        runner: ModelRunner,
        state: ClusterState,
        requests: Sequence[Request | None],
        width: int,
        lanes: Lanes,
        l: int,
        graphs: Mapping[int, DecodeGraphs] | None = None,
    ) -> None:
        self._runner, self._requests = runner, requests
        self._lanes, self._l, self._graphs = lanes, l, graphs or {}
        self._on: Lane | None = None  # where the step before ran
        self.without_graph: Counter[str] = Counter()
        self._state = state
        rows = state.run.shape[1] + state.prefills.shape[1]
        self._columns = (
            np.zeros(rows, np.int32), np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.zeros(rows, np.uint8),
            np.zeros(rows, np.int32), np.zeros((rows, width), np.int32),
        )  # fmt: skip
        self._batch: Batch | None = None
        self._carry: Carry | None = None
        self._sampling: list[Request] = []

    def describe(self, words: np.ndarray, i: int, l: int) -> Step:
        """The step that the core has put into lane (i, l)."""
        lane = self._state.lane[i, l]
        layers = (int(lane["layer_from"]), int(lane["layer_to"]) or self._runner.n_layers)
        n = live.describe_step(words, i, l, *self._columns)
        found = [self._requests[r] for r in self._columns[0][:n].tolist()]
        requests = [request for request in found if request is not None]
        assert len(requests) == n, "a step with a request nobody knows"
        partition = partition_of(self._state, self._lanes, i, l)
        if layers[0] > 0:
            return Step([], requests, layers, partition)
        return Step([self._span(k, request) for k, request in enumerate(requests)], requests, layers, partition)

    def _span(self, k: int, request: Request) -> Span:
        """The tokens of the ``k``-th sequence that was described."""
        _, starts, counts, sample, used, table = self._columns
        start = int(starts[k])
        tokens = request.tokens[start : start + int(counts[k])]
        return Span(tokens.tolist(), start, table[k, : used[k]].tolist(), bool(sample[k]))

    def run(self, step: Step) -> StepResult:
        """Run the step; what goes wrong is part of the result."""
        try:
            lane = self._lanes.lane(self._l, step.partition)
            with lane.open():
                if self._on is not None and self._on is not lane:
                    lane.follow(self._on)  # the partition has changed: no drain, the device waits by itself
                    if self._carry is not None:
                        lane.keep(self._carry.hidden, self._carry.residual)
                self._on = lane
                deltas = self._run(step, lane)
                lane.wait()
            return StepResult(deltas)
        except Exception as error:  # out of memory, a bad kernel: the requests fail, the engine goes on
            self._batch = self._carry = None
            return StepResult([], error)

    def _run(self, step: Step, lane: Lane) -> list[tuple[Request, Delta]]:
        if step.spans:
            self._sampling = [r for r, span in zip(step.requests, step.spans, strict=True) if span.sample]
            logits = self._replay(step, lane)
            if logits is not None:
                return self._push(self._runner.choose(logits, *self._rules()))
            self._batch, self._carry = self._runner.batch(step.spans, sm_count=lane.size), None
        batch = self._batch
        if batch is None:
            raise RuntimeError("the slice of layers before this one failed")
        carry = self._runner.run_layers(batch, step.layers, self._carry)
        if step.layers[1] < self._runner.n_layers:
            self._carry = carry
            return []
        self._batch = self._carry = None
        if not self._sampling:
            return []
        return self._push(self._runner.sample(batch, carry, *self._rules()))

    def _replay(self, step: Step, lane: Lane) -> Tensor | None:
        """Logits of a decode step by a graph; None when it must run without."""
        graphs = self._graphs.get(step.partition)
        if graphs is None or len(self._sampling) != len(step.spans) or any(len(s.tokens) > 1 for s in step.spans):
            return None
        bucket = graphs.bucket(step.spans)
        if bucket is None:
            self.without_graph[graphs.reason(step.spans)] += 1
            return None
        return graphs.logits(bucket, step.spans)

    def _rules(self) -> tuple[list[SamplingParams], list[int]]:
        return [r.params for r in self._sampling], [r.n_generated for r in self._sampling]

    def _push(self, sampled: Tensor) -> list[tuple[Request, Delta]]:
        tokens: list[int] = sampled.tolist()
        return [(request, request.push(token)) for request, token in zip(self._sampling, tokens, strict=True)]
