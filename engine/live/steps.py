"""From the step written in a lane to tokens: what one lane of one instance runs.

What goes wrong with one request is that request's own affair: a step that fails is run again sequence by sequence, and
only those fail that fail alone. KV that is written twice is the same KV, so nothing of the first try does harm.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import compress, repeat
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from engine.core import loop
from engine.core.state import ClusterState
from engine.jit.rows import addresses
from engine.kernels import Scored, Spans
from engine.lanes.base import WHOLE
from engine.live.hosts import Executor, InstanceLost
from engine.live.request import Delta, Request
from engine.model.sampling import Logprobs

_log = logging.getLogger("slalom.runner")
_newest = attrgetter("newest")


class Step(NamedTuple):
    """One forward pass, or a slice of its layers. ``spans`` is None for a slice after the first."""

    spans: Spans | None
    requests: list[Request]  # one for each span
    layers: tuple[int, int]
    partition: int = WHOLE


class StepResult(NamedTuple):
    """``deltas``: what each sampling request got. ``lost``: nothing will run here any more, and nothing came of it.

    ``due``: those of ``deltas`` after which there is something to do for the request itself (``Request.due``).
    ``failed``: requests that cannot go on, and why.
    ``run_s``: seconds that the lane's thread took, and ``cpu_s`` of its CPU meanwhile.
    """

    deltas: list[tuple[Request, Delta]]
    lost: InstanceLost | None = None
    due: Sequence[tuple[Request, Delta]] = ()
    failed: Sequence[tuple[Request, Exception]] = ()
    run_s: float = 0.0
    cpu_s: float = 0.0


class _Pass(NamedTuple):
    """A forward pass: its sequences, and whose they are."""

    spans: Spans
    requests: list[Request]

    def sampling(self) -> list[Request]:
        """Those that get a token in the end."""
        wanted = self.spans.sample
        return self.requests if bool(wanted.all()) else list(compress(self.requests, wanted.tolist()))

    def kept(self) -> _Pass:
        """For later: others may be written into the same columns before its last slice ends."""
        spans = self.spans
        names = ("counts", "starts", "sample", "n_blocks", "blocks")
        return _Pass(replace(spans, **{name: getattr(spans, name).copy() for name in names}), self.requests)


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
        self._present: list[Request] = []  # whose step that was
        self._passes: list[_Pass] = []  # whose last layers are still to come; those that stand aside first
        self._said: set[str] = set()  # faults whose traceback has been logged

    def _views(self, n: int) -> list[np.ndarray]:
        slots, starts, counts, sample, n_blocks, blocks, _ = (column[:n] for column in self._columns)
        return [slots, starts, counts, sample.view(np.bool_), n_blocks, blocks]

    def describe(self, words: np.ndarray, i: int, l: int) -> Step:
        """The step that the core has put into lane (i, l)."""
        n, prompts, begin, end, same = loop.describe_step(words, self._where, i, l)
        if n != len(self._first[0]):
            self._first = self._views(n)
        # Views, not copies: the columns are written again only when this step, or its next slice, has ended.
        slots, starts, counts, sample, n_blocks, blocks = self._first
        if not same or n != len(self._present):  # a new list: that of a step is kept until its last slice has ended
            self._present = list(map(self._requests.__getitem__, slots.tolist()))  # type: ignore[arg-type]
            assert all(self._present), "a step with a request nobody knows"
        requests = self._present
        layers = (begin, end or self.executor.n_layers)
        partition = self.executor.partition(self._state, i, l)
        if begin > 0:
            return Step(None, requests, layers, partition)
        tokens = self._tokens(requests, prompts, starts, counts)
        scored = self._scored(requests[:prompts], starts, counts) if prompts else ()
        spans = Spans(tokens, counts, starts, sample, n_blocks, blocks, prompts, scored)
        return Step(spans, requests, layers, partition)

    @staticmethod
    def _scored(prompts: list[Request], starts: np.ndarray, counts: np.ndarray) -> Sequence[Scored]:
        """What the model is to say of prompts, of which a step computes these chunks."""
        asking = [k for k, request in enumerate(prompts) if not request.reuses]
        found = [(k, prompts[k].scored(int(starts[k]), int(counts[k]))) for k in asking]
        return [Scored(k, prompts[k].params.prompt_logprobs or 0, tokens) for k, tokens in found if tokens]

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
            return self._run(step)
        except InstanceLost as error:
            return StepResult([], error)
        except Exception as error:  # a fault of ours: the requests fail, the engine goes on
            return StepResult([], failed=[(request, error) for request in step.requests])

    def _run(self, step: Step) -> StepResult:
        begun = self._passes.pop() if step.spans is None else _Pass(step.spans, step.requests)
        last = step.layers[1] >= self.executor.n_layers
        if not last:
            self._passes.append(begun if step.spans is None else begun.kept())
        sampling = begun.sampling() if last else []
        params, steps = [r.params for r in sampling], [r.n_tokens - r.n_prompt for r in sampling]
        try:
            tokens = self.executor.run(step.spans, step.layers, params, steps, step.partition)
        except InstanceLost:
            raise
        except Exception as error:  # out of memory, a bad kernel, a request that cannot be served
            self._say(len(step.requests), error)
            if not last:
                return StepResult([])  # the executor refuses the slices that follow, too: the last one makes up for it
            if len(begun.requests) == 1:
                return StepResult([], failed=[(begun.requests[0], error)])
            return self._one_by_one(begun, step.partition)
        if last:
            self._keep_scores(begun.spans, begun.requests)
        return self._hand_out(zip(sampling, tokens, self._logprobs(tokens), strict=True), [])

    def _one_by_one(self, begun: _Pass, partition: int) -> StepResult:
        """Run each sequence of a pass alone, all layers of it: the innocent get their tokens."""
        found: list[tuple[Request, int, Logprobs | None]] = []
        failed: list[tuple[Request, Exception]] = []
        whole = (0, self.executor.n_layers)
        for k, request in enumerate(begun.requests):
            spans = begun.spans.alone(k)
            params, steps = [request.params], [request.n_tokens - request.n_prompt]
            n = int(spans.sample[0])
            try:
                tokens = self.executor.run(spans, whole, params[:n], steps[:n], partition)
            except InstanceLost:
                raise
            except Exception as error:
                failed.append((request, error))
            else:
                self._keep_scores(spans, [request])
                found.extend((request, *token) for token in zip(tokens, self._logprobs(tokens), strict=True))
        return self._hand_out(found, failed)

    def _keep_scores(self, spans: Spans, requests: Sequence[Request]) -> None:
        for wanted, scores in zip(spans.scored, self.executor.prompt_logprobs, strict=True):
            first = int(spans.starts[wanted.span]) + 1
            requests[wanted.span].prompt_logprobs[first : first + len(scores)] = scores

    def _logprobs(self, tokens: Sequence[int]) -> Iterable[Logprobs | None]:
        """Of the tokens of the step that has just ended, one for each."""
        return self.executor.logprobs or repeat(None, len(tokens))

    @staticmethod
    def _hand_out(
        sampled: Iterable[tuple[Request, int, Logprobs | None]], failed: list[tuple[Request, Exception]]
    ) -> StepResult:
        deltas = []
        for request, token, logprobs in sampled:
            try:
                deltas.append((request, request.push(token, logprobs)))
            except Exception as error:  # its text, its stop strings
                failed.append((request, error))
        return StepResult(deltas, None, [pair for pair in deltas if pair[0].n_tokens > pair[0].due], failed)

    def _say(self, n: int, error: Exception) -> None:
        """Log a failed step, with its traceback the first time: one that always fails must not fill the disk."""
        what = repr(error)[:200]
        new = what not in self._said and len(self._said) < 32
        if new:
            self._said.add(what)
        _log.error("a step of %d requests failed: %s", n, what, exc_info=error if new else None)
