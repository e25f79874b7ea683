"""From the step written in a lane to tokens: what one lane of one instance runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.core import live
from engine.core.state import ClusterState
from engine.hosts import Executor
from engine.kernels import Span
from engine.lanes import WHOLE
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
    """

    def __init__(self, executor: Executor, state: ClusterState, requests: Sequence[Request | None], width: int) -> None:
        self.executor, self._requests = executor, requests
        self._state = state
        rows = state.run.shape[1] + state.prefills.shape[1]
        self._columns = (
            np.zeros(rows, np.int32), np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.zeros(rows, np.uint8),
            np.zeros(rows, np.int32), np.zeros((rows, width), np.int32),
        )  # fmt: skip
        self._sampling: list[Request] = []

    def describe(self, words: np.ndarray, i: int, l: int) -> Step:
        """The step that the core has put into lane (i, l)."""
        lane = self._state.lane[i, l]
        layers = (int(lane["layer_from"]), int(lane["layer_to"]) or self.executor.n_layers)
        n = live.describe_step(words, i, l, *self._columns)
        found = [self._requests[r] for r in self._columns[0][:n].tolist()]
        requests = [request for request in found if request is not None]
        assert len(requests) == n, "a step with a request nobody knows"
        partition = self.executor.partition(self._state, i, l)
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
            return StepResult(self._run(step))
        except Exception as error:  # out of memory, a bad kernel: the requests fail, the engine goes on
            return StepResult([], error)

    def _run(self, step: Step) -> list[tuple[Request, Delta]]:
        if step.spans:
            self._sampling = [r for r, span in zip(step.requests, step.spans, strict=True) if span.sample]
        sampling = self._sampling if step.layers[1] >= self.executor.n_layers else []
        params, steps = [r.params for r in sampling], [r.n_generated for r in sampling]
        tokens = self.executor.run(step.spans, step.layers, params, steps, step.partition)
        return [(request, request.push(token)) for request, token in zip(sampling, tokens, strict=True)]
