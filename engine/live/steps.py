"""From the step written in a lane to tokens: what one lane of one instance runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from engine.core import loop
from engine.core.state import ClusterState
from engine.jit.rows import addresses
from engine.kernels import Spans
from engine.lanes.base import WHOLE
from engine.live.hosts import Executor
from engine.live.request import Delta, Request

__all__ = ["LaneRunner", "Step", "StepResult"]

_newest = attrgetter("newest")


class Step(NamedTuple):
    """One forward pass, or a slice of its layers. ``spans`` is None for a slice after the first."""

    spans: Spans | None
    requests: list[Request]  # one for each span
    layers: tuple[int, int]
    partition: int = WHOLE


class StepResult(NamedTuple):
    """``deltas``: what each sampling request got. ``error``: why there is nothing; its requests cannot go on.

    ``due``: those of ``deltas`` after which there is something to do for the request itself (``Request.due``).
    """

    deltas: list[tuple[Request, Delta]]
    error: Exception | None = None
    due: Sequence[tuple[Request, Delta]] = ()


class LaneRunner:
    """Writes steps down in the loop's thread and runs them in the lane's, one after the other.

    :param requests: by slot; shared with whoever admits them
    :param width: blocks of the longest request
    """

    def __init__(self, executor: Executor, state: ClusterState, requests: Sequence[Request | None], width: int) -> None:
        self.executor, self._requests = executor, requests
        self._state = state
        self._columns = loop.step_columns(state.run.shape[1] + state.prefills.shape[1], width)
        self._where = addresses(self._columns)
        self._first = self._views(0)  # of the columns, their part that the last step used
        self._sampling: list[list[Request]] = []  # of the passes under way; those that stand aside first

    def _views(self, n: int) -> list[np.ndarray]:
        slots, starts, counts, sample, n_blocks, blocks, _ = (column[:n] for column in self._columns)
        return [slots, starts, counts, sample.view(np.bool_), n_blocks, blocks]

    def describe(self, words: np.ndarray, i: int, l: int) -> Step:
        """The step that the core has put into lane (i, l)."""
        n, prompts, begin, end = loop.describe_step(words, self._where, i, l)
        if n != len(self._first[0]):
            self._first = self._views(n)
        # Views, not copies: the columns are written again only when this step, or its next slice, has ended.
        slots, starts, counts, sample, n_blocks, blocks = self._first
        requests: list[Request] = list(map(self._requests.__getitem__, slots.tolist()))  # type: ignore[arg-type]
        assert all(requests), "a step with a request nobody knows"
        layers = (begin, end or self.executor.n_layers)
        partition = self.executor.partition(self._state, i, l)
        if begin > 0:
            return Step(None, requests, layers, partition)
        tokens = self._tokens(requests, prompts, starts, counts)
        return Step(Spans(tokens, counts, starts, sample, n_blocks, blocks), requests, layers, partition)

    @staticmethod
    def _tokens(requests: list[Request], prompts: int, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """What the step computes, int64 (T,): chunks of the first ``prompts`` requests, a token of each other one."""
        if prompts == 0:
            return np.fromiter(map(_newest, requests), np.int64, len(requests))
        newest = np.fromiter(map(_newest, requests[prompts:]), np.int64, len(requests) - prompts)
        places = zip(requests, starts[:prompts].tolist(), counts[:prompts].tolist(), strict=False)
        return np.concatenate([*(request.tokens[at : at + count] for request, at, count in places), newest])

    def run(self, step: Step) -> StepResult:
        """Run the step; what goes wrong is part of the result."""
        try:
            deltas = self._run(step)
        except Exception as error:  # out of memory, a bad kernel: the requests fail, the engine goes on
            return StepResult([], error)
        return StepResult(deltas, None, [pair for pair in deltas if pair[0].n_tokens > pair[0].due])

    def _run(self, step: Step) -> list[tuple[Request, Delta]]:
        if step.spans is not None:
            wanted = step.spans.sample
            every = bool(wanted.all())
            self._sampling.append(step.requests if every else list(compress(step.requests, wanted.tolist())))
        sampling = self._sampling.pop() if step.layers[1] >= self.executor.n_layers else []
        params, steps = [r.params for r in sampling], [r.n_tokens - r.n_prompt for r in sampling]
        tokens = self.executor.run(step.spans, step.layers, params, steps, step.partition)
        return [(request, request.push(token)) for request, token in zip(sampling, tokens, strict=True)]
