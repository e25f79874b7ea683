"""What times steps runs them as an engine does: by an executor, on a lane of its own, by graphs where it has some."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from live_cases import MODEL, TOKENIZER
from test_graphs import Rerun
from test_lanes import needs_two_cores

from engine.calibration import Bench, Campaign, Limits, Point, Store
from engine.calibration.design import Space
from engine.calibration.quick import measure
from engine.calibration.shares import measure_share
from engine.kernels import Spans
from engine.kernels.compiled import CompiledKernels
from engine.lanes.base import WHOLE, Lane
from engine.lanes.partitions import make_device
from engine.live.hosts import LocalExecutor
from engine.model import ModelRunner, SamplingParams
from engine.workers.worker import Worker

SPACE = Space(max_tokens=64, max_reused=64, max_batch=4, max_context=64, kv_tokens=1024)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[int, int, bool, bool]]]:
    """What executors ran: lane, partition, whether it was a decode step, whether a graph."""
    monkeypatch.setattr(CompiledKernels, "replayable", True)
    monkeypatch.setattr("engine.live.hosts.CHUNKS", (16, 64, 128, 256))
    found: Counter[tuple[int, int, bool, bool]] = Counter()
    replay = LocalExecutor._replay

    def watched(self: LocalExecutor, spans: Spans, partition: int) -> Any:
        result = replay(self, spans, partition)
        found[self._l, partition, spans.decodes, result is not None] += 1
        return result

    monkeypatch.setattr(LocalExecutor, "_replay", watched)
    run = ModelRunner.run

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a step beside the executor")

    monkeypatch.setattr(ModelRunner, "run", forbidden)
    yield found
    monkeypatch.setattr(ModelRunner, "run", run)


@pytest.mark.parametrize(
    "point",
    [
        Point("prefill", n=20, r=16, prompts=2), Point("prefill", n=1, prompts=1), Point("decode", bs=3, ctx=30),
        Point("fused", n=9, prompts=1, bs=2, ctx=20),
    ],
    ids=lambda p: f"{p.kind}-{p.n}",
)  # fmt: skip
def test_a_measured_step_is_a_replay(steps: Counter[Any], point: Point) -> None:
    bench = Bench(MODEL, kv_tokens=1024, make=Rerun)
    assert not bench.measure(point).failed
    bench.close()
    assert set(steps) == {(0, WHOLE, point.kind == "decode", True)}


def test_without_graphs_a_step_still_runs_on_its_lane(steps: Counter[Any]) -> None:
    sms = set()
    bench = Bench(MODEL, kv_tokens=1024, eager=True, make=Rerun)
    batch = bench.runner.batch

    def watched(spans: Sequence[Any], *, sm_count: int) -> Any:
        sms.add(sm_count)
        return batch(spans, sm_count=sm_count)

    bench.runner.batch = watched  # type: ignore[method-assign, assignment]
    assert not bench.measure(Point("decode", bs=3, ctx=30)).failed
    assert set(steps) == {(0, WHOLE, True, False)}
    assert sms == {make_device("cpu").total}, "split-KV is sized for another lane"


@needs_two_cores
def test_a_share_is_measured_on_both_lanes_of_its_partition(steps: Counter[Any]) -> None:
    measure_share(MODEL, make_device("cpu"), SPACE, 1, make=Rerun)
    places = {(l, partition == WHOLE) for l, partition, _, _ in steps}
    assert places == {(0, True), (0, False), (1, True), (1, False)}
    assert all(replayed for *_, replayed in steps)
    assert {(l, decodes) for l, _, decodes, _ in steps} == {(0, False), (1, True)}


def test_the_profile_at_start_and_the_campaign_use_executors(
    steps: Counter[Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(MODEL)
    assert sum(steps.values()) == 4 * 8, "a step before, then three timed"
    steps.clear()
    store = Store(tmp_path / "points.jsonl", {"model": "tiny"})
    for name in ("roofline", "host", "link", "switch_s"):
        store.note(name, 1.0)
    ticks = iter(range(10**6))
    Campaign(MODEL, TOKENIZER, SPACE, store, Limits(budget_s=8.0), warm=False, clock=lambda: float(next(ticks))).run()
    assert sum(steps.values()) >= len(store.points) > 0


def test_a_worker_decodes_by_graphs_of_its_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompiledKernels, "replayable", True)
    monkeypatch.setattr("engine.live.hosts.CHUNKS", (16,))
    made: list[Rerun] = []

    def make() -> Rerun:
        made.append(Rerun())
        return made[-1]

    worker = Worker(MODEL, frozenset(), make)
    worker._administer({"do": "pools", "blocks": {"0": 32}, "block_tokens": 16})
    lanes = [worker._lane({"lane": l, "pool": 0, "instance": 0, "sizes": [], "graphs": [128, 4, 8]}) for l in (0, 1)]
    bench = Bench(MODEL, kv_tokens=512)
    greedy = partial(lanes[1].run, layers=(0, MODEL.config.n_layers))
    cold, spans = SamplingParams(temperature=0.0), bench.spans(Point("decode", bs=2, ctx=20))
    plain = Worker(MODEL, frozenset())
    plain._administer({"do": "pools", "blocks": {"0": 32}, "block_tokens": 16})
    lane = plain._lane({"lane": 1, "pool": 0, "instance": 0, "sizes": []})
    expected = lane.run(spans, (0, MODEL.config.n_layers), [cold] * 2, [0, 0])
    assert greedy(spans, params=[cold] * 2, steps=[0, 0]) == expected
    assert [capturer.replays for capturer in made] == [0, 1]
    lanes[1].close()
    assert not lanes[1]._graphs[WHOLE]._graphs


def test_a_worker_captures_for_one_lane_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner may come while the one before it is still being served: torch can capture once in a process."""
    monkeypatch.setattr(CompiledKernels, "replayable", True)
    monkeypatch.setattr("engine.live.hosts.CHUNKS", (16,))
    both = threading.Barrier(2)
    met: list[int] = []

    class Meets(Rerun):
        def capture(self, lane: Lane, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            with suppress(threading.BrokenBarrierError):
                met.append(both.wait(0.5))
            return super().capture(lane, function)

    worker = Worker(MODEL, frozenset(), Meets)
    worker._administer({"do": "pools", "blocks": {"0": 32}, "block_tokens": 16})
    opening = {"pool": 0, "instance": 0, "sizes": [], "graphs": [128, 1, 2]}
    threads = [threading.Thread(target=worker._lane, args=(opening | {"lane": l},)) for l in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met == []
