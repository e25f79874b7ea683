"""Prefill and decode on disjoint cores of this machine, at the same time, over one KV pool."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
from live_cases import GREEDY, PROMPTS, cores, engine_on, mixed, send
from test_lanes import CORES, needs_two_cores
from waiting import until

from engine.core.kinds import Batching, Role
from engine.lanes.base import WHOLE
from engine.live.steps import LaneRunner, Step

LONG = replace(GREEDY, max_tokens=160)


@needs_two_cores
@pytest.mark.parametrize("batching", [Batching.LAYERED, Batching.CHUNKED], ids=lambda b: b.name.lower())
def test_prefill_beside_decode_on_two_lanes(batching: Batching, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both lanes compute at once, each on its own cores, and no token changes for it."""
    with engine_on(mixed()) as engine:
        expected = [send(engine, p, LONG if k == 0 else GREEDY).wait().tokens for k, p in enumerate(PROMPTS)]
    seen: set[tuple[int, int]] = set()
    bound: set[tuple[int, frozenset[int]]] = set()
    run, busy, overlaps = LaneRunner.run, [0, 0], []

    def watched(self: LaneRunner, step: Step) -> Any:
        if step.partition != WHOLE:
            seen.add((self.executor._l, step.partition))
        busy[self.executor._l] += 1
        overlaps.append(busy[1 - self.executor._l] > 0)
        try:
            result = run(self, step)
            if step.partition != WHOLE:
                bound.add((self.executor._l, frozenset(os.sched_getaffinity(0))))
            return result
        finally:
            busy[self.executor._l] -= 1

    monkeypatch.setattr(LaneRunner, "run", watched)
    role = {"role": Role.MULTIPLEXED, "batching": batching, "chunk_tokens": 24, "split": 0}
    with engine_on(mixed(**role), tables_of=cores(len(CORES)), prefix_cache=False) as engine:
        first = send(engine, PROMPTS[0], LONG)
        until(lambda: len(first.tokens) > 2)
        others = [send(engine, prompt) for prompt in PROMPTS[1:]]
        assert [first.wait().tokens, *(caller.wait().tokens for caller in others)] == expected
    assert (0, 0) in seen, "prefill ran on a partition"
    assert (1, 0) in seen, "decode ran on a partition"
    assert any(overlaps), "the lanes took turns"
    assert bound == {(0, frozenset(CORES[:-1])), (1, frozenset(CORES[-1:]))}
