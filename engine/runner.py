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
        self._rows = list(self._columns[5])
        self._sampling: list[list[Request]] = []  # of the passes under way; those that stand aside first

    def describe(self, words: np.ndarray, i: int, l: int) -> Step:
        """The step that the core has put into lane (i, l)."""
        lane = self._state.lane[i, l]
        layers = (int(lane["layer_from"]), int(lane["layer_to"]) or self.executor.n_layers)
        n = live.describe_step(words, i, l, *self._columns)
        slots, starts, counts, sample, used = (column[:n].tolist() for column in self._columns[:5])
        requests = [request for r in slots if (request := self._requests[r]) is not None]
        assert len(requests) == n, "a step with a request nobody knows"
        partition = self.executor.partition(self._state, i, l)
        if layers[0] > 0:
            return Step([], requests, layers, partition)
        # Views, not copies: the table is written again only when this step has ended, tokens only behind these.
        spans = [
            Span(request.tokens[start : start + count], start, row[:blocks], wanted == 1)
            for request, start, count, wanted, blocks, row in zip(
                requests, starts, counts, sample, used, self._rows, strict=False
            )
        ]
        return Step(spans, requests, layers, partition)

    def run(self, step: Step) -> StepResult:
        """Run the step; what goes wrong is part of the result."""
        try:
            return StepResult(self._run(step))
        except Exception as error:  # out of memory, a bad kernel: the requests fail, the engine goes on
            return StepResult([], error)

    def _run(self, step: Step) -> list[tuple[Request, Delta]]:
        if step.spans:
            self._sampling.append([r for r, span in zip(step.requests, step.spans, strict=True) if span.sample])
        sampling = self._sampling.pop() if step.layers[1] >= self.executor.n_layers else []
        params, steps = [r.params for r in sampling], [r.n_generated for r in sampling]
        tokens = self.executor.run(step.spans, step.layers, params, steps, step.partition)
        return [(request, request.push(token)) for request, token in zip(sampling, tokens, strict=True)]
