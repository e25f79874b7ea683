"""Prefill and decode on disjoint cores of this machine, at the same time, over one KV pool; and decode graphs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from live_cases import GREEDY, MODEL, PROMPTS, cores, engine_on, mixed, send, until
from test_lanes import CORES, needs_two_cores
from torch import Tensor

from engine.core.kinds import Batching, Role
from engine.kernels import Span
from engine.lanes.base import WHOLE, Lane
from engine.lanes.partitions import Lanes, make_device
from engine.live.graphs import DecodeGraphs, graphs_of
from engine.live.hosts import LocalExecutor
from engine.live.steps import LaneRunner, Step
from engine.model import KVPool, ModelRunner, SamplingParams

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


# -- graphs, captured by a capturer that remembers the function and runs it again


class Rerun:
    """A capturer whose graphs are the functions themselves, on their static tensors."""

    def __init__(self, *, bytes_each: int = 0, fail: int = 0) -> None:
        self.lanes: list[Lane] = []
        self.replays = 0
        self._bytes, self._fail = bytes_each, fail

    def capture(self, lane: Lane, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.lanes.append(lane)
        if len(self.lanes) == self._fail:
            raise RuntimeError("out of memory")
        with torch.inference_mode():
            result = function().clone()

        def replay() -> None:
            self.replays += 1
            result.copy_(function())

        return replay, result

    def held_bytes(self) -> int:
        return self._bytes * len(self.lanes)


@pytest.fixture
def runner() -> ModelRunner:
    return ModelRunner(MODEL, KVPool(MODEL.config, blocks=64, block_tokens=16))


def graphs(runner: ModelRunner, capturer: Rerun, **options: Any) -> DecodeGraphs:
    lane = make_device("cpu").whole().decode
    kernels = (runner.model.kernels.name,)
    return DecodeGraphs(runner, lane, capturer, **({"width": 8, "buckets": (1, 2, 4), "replayable": kernels} | options))


def prefilled(runner: ModelRunner, n: int) -> list[Span]:
    """The next decode step of ``n`` sequences."""
    greedy = SamplingParams(temperature=0.0)
    spans = []
    for k, prompt in enumerate(PROMPTS[:n]):
        blocks = [1 + 5 * k + i for i in range(5)]
        tokens = runner.run(runner.batch([Span(prompt, 0, blocks)]), [greedy], [0])
        spans.append(Span(tokens, len(prompt), blocks))
    return spans


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_replayed_step_is_the_step(runner: ModelRunner, n: int) -> None:
    capturer = Rerun()
    decode = graphs(runner, capturer)
    assert decode.missing == {}
    spans = prefilled(runner, n)
    untouched = [layer[:, 0].clone() for layer in runner.pool.layers]
    bucket = decode.bucket(spans)
    assert bucket == {1: 1, 2: 2, 3: 4, 4: 4}[n]
    replayed = decode.logits(bucket, spans).clone()
    batch = runner.batch(spans)
    expected = runner.model.logits(runner.model(batch, runner.pool), batch)
    torch.testing.assert_close(replayed, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(replayed.argmax(-1), expected.argmax(-1))
    for layer, before in zip(runner.pool.layers, untouched, strict=True):
        assert torch.equal(layer[:, 0], before), "padding wrote KV"
    shorter = [spans[0]]
    bucket = decode.bucket(shorter)
    assert bucket == 1
    torch.testing.assert_close(decode.logits(bucket, shorter), expected[:1], rtol=1e-4, atol=1e-5)


def test_every_partition_captures_on_its_own_decode_lane(runner: ModelRunner) -> None:
    class Two(type(make_device("cpu"))):  # type: ignore[misc]
        total = 2

        def split(self, decode: int) -> Any:
            return self.whole()

    lanes, capturers = Lanes(Two(), [1, 2]), []

    def make() -> Rerun:
        capturers.append(Rerun())
        return capturers[-1]

    runner.model.kernels.name, name = "triton", runner.model.kernels.name  # type: ignore[misc]
    try:
        found = graphs_of([runner], [lanes], 8, make)
    finally:
        runner.model.kernels.name = name  # type: ignore[misc]
    assert set(found[0]) == {WHOLE, 0}
    assert set(capturers[0].lanes) == {lanes.whole.decode, lanes.partitions[0].decode}


def test_why_there_is_no_graph_is_said(runner: ModelRunner) -> None:
    spans = prefilled(runner, 3)
    host = graphs(runner, Rerun(), replayable=("triton",))
    assert host.bucket(spans) is None
    assert "host" in host.reason(spans)

    broken = graphs(runner, Rerun(fail=1))  # the largest is captured first
    assert broken.bucket(spans) is None
    assert "out of memory" in broken.reason(spans)
    assert broken.bucket(spans[:2]) == 2

    bounded = graphs(runner, Rerun(bytes_each=1 << 20), most_bytes=2 << 20)
    assert set(bounded.missing) == {1}
    assert "MiB" in bounded.reason(spans[:1])

    good = graphs(runner, Rerun(), buckets=(1, 2), width=6)
    assert "more than 2" in good.reason(spans)
    assert good.bucket([Span([1, 2], 0, [1])]) is None
    assert "not a decode" in good.reason([Span([1, 2], 0, [1])])
    wide = Span([1], 4, list(range(1, 9)))
    assert good.bucket([wide]) is None
    assert "6 blocks" in good.reason([wide])


def test_lane_runners_replay_decode_steps_and_count_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_on(mixed()) as engine:
        expected = [send(engine, prompt).wait().tokens for prompt in PROMPTS]
    capturer = Rerun()
    with engine_on(mixed(chunk_tokens=24), prefix_cache=False) as engine:
        for lane in engine.instances._lanes:
            executor = lane.runner.executor
            executor._graphs = {WHOLE: graphs(executor._runner, capturer, width=64)}
        callers = [send(engine, prompt) for prompt in PROMPTS]
        assert [caller.wait().tokens for caller in callers] == expected
        reasons = engine.instances._lanes[0].runner.executor.without_graph
    assert capturer.replays > 0
    assert set(reasons) <= {"more than 4 sequences"}
    assert sum(reasons.values()) > 0


@needs_two_cores
def test_a_prompts_last_token_never_replays_the_graph_of_the_decode_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its chunk looks like a decode step; replayed, it would overwrite the static inputs that lane 1 computes with."""
    prompts = [(PROMPTS[k % len(PROMPTS)] * 8)[: 24 * (1 + k % 3) + 1] for k in range(24)]
    with engine_on(mixed()) as engine:
        expected = [send(engine, prompt, LONG if k < 2 else GREEDY).wait().tokens for k, prompt in enumerate(prompts)]
    asked: Counter[tuple[int, bool, bool]] = Counter()  # lane, a token for each sequence, replayed
    replay = LocalExecutor._replay

    def watched(self: LocalExecutor, spans: Any, n_sampling: int, partition: int) -> Tensor | None:
        found = replay(self, spans, n_sampling, partition)
        asked[self._l, n_sampling == len(spans) == len(spans.tokens), found is not None] += 1
        return found

    monkeypatch.setattr(LocalExecutor, "_replay", watched)
    role = {"role": Role.MULTIPLEXED, "batching": Batching.CHUNKED, "chunk_tokens": 24, "split": 0}
    with engine_on(mixed(**role), tables_of=cores(len(CORES)), prefix_cache=False) as engine:
        executors = [lane.runner.executor for lane in engine.instances._lanes]
        shared = graphs(executors[0]._runner, Rerun(), width=64, buckets=(1, 2, 4, 8, 16))
        for executor in executors:
            executor._graphs = {WHOLE: shared, 0: shared}
        callers = [send(engine, prompt, LONG) for prompt in prompts[:2]]
        until(lambda: all(len(caller.tokens) > 2 for caller in callers))
        callers += [send(engine, prompt).wait() for prompt in prompts[2:]]  # one after the other: nothing fills a chunk
        assert [caller.wait().tokens for caller in callers] == expected
    assert asked[0, True, False] > 0, "no chunk of one token was met"
    assert asked[0, True, True] == 0
    assert asked[1, True, True] > 100
