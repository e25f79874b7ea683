"""Graphs of a lane, captured by a capturer that remembers the function and runs it again on its static input."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from live_cases import GREEDY, MODEL, PROMPTS, cores, engine_on, mixed, send
from prometheus_client import generate_latest
from test_lanes import CORES, FakeDriver, FakeStreams, needs_two_cores

from engine.core.kinds import Batching, Role
from engine.errors import SlalomError
from engine.kernels import Span, Spans, compilations
from engine.kernels.compiled import CompiledKernels
from engine.lanes.base import WHOLE, Lane
from engine.lanes.gpu import GpuDevice
from engine.lanes.partitions import Lanes, make_device
from engine.live.graphs import LaneGraphs, decode_buckets
from engine.live.hosts import GraphSizes, LocalExecutor, LocalHost, _Shared, local_hosts
from engine.model import KVPool, ModelRunner, SamplingParams
from engine.server.metrics import Metrics

COLD = SamplingParams(temperature=0.0)


class Rerun:
    """A capturer whose graphs are the functions themselves, on their static tensors."""

    def __init__(self, *, bytes_each: int = 0, fail: int = 0) -> None:
        self.lanes: list[Lane] = []
        self.replays = 0
        self._bytes, self._fail = bytes_each, fail

    def capture(self, lane: Lane, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.lanes.append(lane)
        if len(self.lanes) == self._fail:
            raise RuntimeError("out of memory")
        results = function()
        kept = tuple(x.clone() for x in results) if isinstance(results, tuple) else results.clone()

        def replay() -> None:
            self.replays += 1
            found = function()
            pairs = zip(kept, found, strict=True) if isinstance(kept, tuple) else [(kept, found)]
            for old, new in pairs:
                old.copy_(new)

        return replay, kept

    def held_bytes(self) -> int:
        return self._bytes * len(self.lanes)


@pytest.fixture
def runner() -> ModelRunner:
    return ModelRunner(MODEL, KVPool(MODEL.config, blocks=64, block_tokens=16))


def graphs(runner: ModelRunner, capturer: Rerun, **options: Any) -> LaneGraphs:
    usual: dict[str, Any] = {"width": 8, "decodes": (1, 2, 4), "chunks": (16, 64), "replayable": True}
    return LaneGraphs(runner, make_device("cpu").whole().decode, capturer, **(usual | options))


def prefilled(runner: ModelRunner, n: int) -> list[Span]:
    """The next decode step of ``n`` sequences."""
    spans = []
    for k, prompt in enumerate(PROMPTS[:n]):
        blocks = [1 + 5 * k + i for i in range(5)]
        tokens = runner.run(runner.batch([Span(prompt, 0, blocks)]), [COLD], [0])
        spans.append(Span(tokens, len(prompt), blocks))
    return spans


def with_prompts(spans: list[Span], n: int) -> Spans:
    """A step whose first ``n`` sequences compute a part of their prompt."""
    return replace(Spans.of(spans), prompts=n)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_replayed_decode_step_is_the_step(runner: ModelRunner, n: int) -> None:
    found = graphs(runner, Rerun())
    assert found.missing == {}
    spans = prefilled(runner, n)
    untouched = [layer[:, 0].clone() for layer in runner.pool.layers]
    replay = found.replay(spans)
    assert replay is not None
    assert replay.batch.n_rows == {1: 1, 2: 2, 3: 4, 4: 4}[n]
    assert replay.logits is not None
    replayed, batch = replay.logits.clone(), runner.batch(spans)
    expected = runner.model.logits(runner.model(batch, runner.pool), batch)
    torch.testing.assert_close(replayed, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(replayed.argmax(-1), expected.argmax(-1))
    for layer, before in zip(runner.pool.layers, untouched, strict=True):
        assert torch.equal(layer[:, 0], before), "padding wrote KV"
    shorter = found.replay([spans[0]])
    assert shorter is not None
    torch.testing.assert_close(shorter.logits, expected[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("chunks", "decodes", "sample"),
    [([(9, 0)], 0, [True]), ([(9, 0), (7, 16)], 2, [False, True]), ([(1, 20)], 3, [True]), ([(40, 8)], 4, [False])],
    ids=["prompt", "two-chunks-and-decodes", "last-token-of-a-prompt", "nothing-sampled"],
)
def test_a_replayed_step_with_prompts_is_the_step(
    runner: ModelRunner, chunks: list[tuple[int, int]], decodes: int, sample: list[bool]
) -> None:
    found = graphs(runner, Rerun())
    spans, tokens = prefilled(runner, decodes) if decodes else [], random.Random(3)
    prompts = []
    for k, ((new, past), samples) in enumerate(zip(chunks, sample, strict=True)):
        blocks = [40 + 8 * k + i for i in range(4)]
        ids = [tokens.randrange(256) for _ in range(past + new)]
        if past:
            runner.run(runner.batch([Span(ids[:past], 0, blocks)]), [COLD], [0])
        prompts.append(Span(ids[past:], past, blocks, samples))
    step = with_prompts(prompts + spans, len(prompts))
    untouched = [layer[:, 0].clone() for layer in runner.pool.layers]
    replay = found.replay(step)
    assert replay is not None
    assert replay.batch.n_rows in (16, 64)
    assert replay.carry is not None
    rows, n = sum(new for new, _ in chunks) + decodes, sum(sample) + decodes
    ours = replay.carry.hidden[:rows].clone()
    said = runner.choose(runner.logits(replay.batch, replay.carry), [COLD] * n, [0] * n).tolist() if n else []
    batch = runner.batch(step)
    carry = runner.model(batch, runner.pool)
    torch.testing.assert_close(ours, carry.hidden, rtol=1e-4, atol=1e-5)
    assert said == (runner.choose(runner.logits(batch, carry), [COLD] * n, [0] * n).tolist() if n else [])
    for layer, before in zip(runner.pool.layers, untouched, strict=True):
        assert torch.equal(layer[:, 0], before), "rows of nobody wrote KV"


def test_sizes_end_at_the_largest_batch() -> None:
    assert decode_buckets(64) == [1, 2, 4, 8, 16, 32, 64]
    assert decode_buckets(48) == [1, 2, 4, 8, 16, 32, 48]
    assert decode_buckets(200) == [1, 2, 4, 8, 16, 32, 64, 128, 192, 200]
    assert decode_buckets(1000)[-1] == 256
    assert decode_buckets(1) == [1]


def test_every_lane_of_every_partition_has_graphs_of_its_own(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompiledKernels, "replayable", True)
    monkeypatch.setattr("engine.live.hosts.CHUNKS", (16,))
    capturers: list[Rerun] = []

    def make() -> Rerun:
        capturers.append(Rerun())
        return capturers[-1]

    device = GpuDevice(FakeDriver(), FakeStreams([]))
    lanes = Lanes(device, [20, 132])
    host = LocalHost(runner, device, lanes, GraphSizes(100, 4, 8), make)
    assert [set(graphs) for graphs in host.graphs] == [{WHOLE, 0}, {WHOLE, 0}]
    assert len(capturers) == 2, "lanes run at once, so they may not share memory"
    prefill, decode = (set(capturer.lanes) for capturer in capturers)
    assert prefill == {lanes.whole.prefill, lanes.partitions[0].prefill}
    assert decode == {lanes.whole.decode, lanes.partitions[0].decode}
    sets = [graphs for lane in host.graphs for graphs in lane.values()]
    assert len({id(one.lane) for one in sets}) == len(sets) == 4, "one stream for each set"
    statics = [captured.static for one in sets for captured in one._graphs.values()]
    assert len({static.batch.tokens.data_ptr() for static in statics}) == len(statics)
    alone = with_prompts([Span([1], 4, [1])], 1)
    assert host.graphs[1][0].replay(alone) is None, "lane 1 replays a step with prompts"
    assert host.graphs[0][0].replay([Span([1], 4, [1])]) is None, "prefill's partition replays a decode step"


def test_graphs_end_before_the_streams_they_were_captured_on_and_the_device_with_its_last_host(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompiledKernels, "replayable", True)
    monkeypatch.setattr("engine.live.hosts.CHUNKS", (16,))
    driver = FakeDriver()

    class Mortal(Rerun):
        def capture(self, lane: Lane, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            replay, result = super().capture(lane, function)

            class Graph:
                def __call__(self) -> None:
                    replay()

                def __del__(self) -> None:
                    driver.log.append("end graph")

            return Graph(), result

    device = GpuDevice(driver, FakeStreams(driver.log))
    shared = _Shared(device, 2)
    hosts = [LocalHost(runner, shared, Lanes(device, [20, 132]), GraphSizes(100, 2, 4), Mortal) for _ in range(2)]
    made = sum(len(one._graphs) for host in hosts for lane in host.graphs for one in lane.values())
    driver.log.clear()
    hosts[0].close()
    gc.collect()
    assert "end context" not in driver.log, "the other instance still runs there"
    hosts[1].close()
    gc.collect()
    ends = [line for line in driver.log if line.startswith("end")]
    assert ends.count("end graph") == made
    assert ends.index("end stream") > max(k for k, line in enumerate(ends) if line == "end graph")
    assert driver.alive == {}


def test_the_first_step_waits_for_weights_and_kv_that_were_made_outside_of_lanes(runner: ModelRunner) -> None:
    """Streams of lanes wait for no other by themselves."""
    log: list[str] = []
    lanes = Lanes(GpuDevice(FakeDriver(), FakeStreams(log)), [20, 132])
    executor, spans = LocalExecutor(runner, lanes, 1), Spans.of(prefilled(runner, 1))
    for partition in (0, WHOLE):
        executor.run(spans, (0, runner.n_layers), [COLD], [0], partition)
    decode, whole = lanes.partitions[0].decode.stream, lanes.whole.decode.stream  # type: ignore[attr-defined]
    waits = [line for line in log if " after " in line]
    assert waits == [f"{decode} after event of default", f"{whole} after event of {decode}"]


def test_a_failed_capture_is_an_error_that_names_the_way_out(runner: ModelRunner) -> None:
    with pytest.raises(SlalomError, match=r"step of 64 rows.*out of memory.*--eager"):
        graphs(runner, Rerun(fail=1))  # the largest is captured first
    with pytest.raises(SlalomError, match="decode step of 4 sequences"):
        graphs(runner, Rerun(fail=3))


def test_why_there_is_no_graph_is_said(runner: ModelRunner) -> None:
    spans = prefilled(runner, 3)
    host = graphs(runner, Rerun(), replayable=None)  # as the kernels of a CPU say
    assert host.replay(spans) is None
    assert "host" in host.reason(spans)

    bounded = graphs(runner, Rerun(bytes_each=1 << 20), most_bytes=3 << 20)
    assert set(bounded.missing) == {(True, 1)}
    assert "MiB" in bounded.reason(spans[:1])

    good = graphs(runner, Rerun(), decodes=(1, 2), width=6, sequences=2)
    assert good.reason(spans) == "a decode step of more than 2 sequences"
    chunk = [Span([1, 2], 0, [1])]
    assert good.replay(chunk) is not None
    assert good.replay(chunk * 3) is None
    assert good.reason(chunk * 3) == "a step with prompts of more than 2 sequences"
    assert good.reason([Span([1] * 65, 0, [1] * 5)]) == "a step with prompts of more than 64 rows"
    assert graphs(runner, Rerun(), chunks=()).reason(chunk) == "a step with prompts on this lane"
    wide = Span([1], 4, list(range(1, 9)))
    assert good.replay([wide]) is None
    assert "6 blocks" in good.reason([wide])


# -- in an engine


@pytest.fixture
def rerun(monkeypatch: pytest.MonkeyPatch) -> list[Rerun]:
    """Engines run with graphs."""
    made: list[Rerun] = []

    def make() -> Rerun:
        made.append(Rerun())
        return made[-1]

    monkeypatch.setattr(CompiledKernels, "replayable", True)
    monkeypatch.setattr("engine.live.engine.local_hosts", partial(local_hosts, make=make))
    return made


def test_an_engine_replays_steps_and_counts_the_others(rerun: list[Rerun], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.live.hosts.decode_buckets", lambda most: [1, 2, 4])
    asked = replace(GREEDY, logprobs=1)
    with engine_on(mixed(), eager=True) as engine:
        expected = [send(engine, prompt).wait().tokens for prompt in PROMPTS]
        logs = [delta.logprobs for delta in send(engine, PROMPTS[5], asked).wait().deltas]
    assert rerun == []
    with engine_on(mixed(chunk_tokens=24), prefix_cache=False) as engine:
        callers = [send(engine, prompt) for prompt in PROMPTS]
        assert [caller.wait().tokens for caller in callers] == expected
        replayed = [delta.logprobs for delta in send(engine, PROMPTS[5], asked).wait().deltas]
        assert [e.token for e in replayed if e] == pytest.approx([e.token for e in logs if e], abs=1e-4)
        assert sum(entry is not None for entry in replayed) >= GREEDY.max_tokens
        reasons = engine.instances.without_graph()
        metrics = Metrics(engine, "tiny", ["default"])
        monkeypatch.setattr(compilations, "_compiled", compilations.count() + 2)  # in flight
        shown = generate_latest(metrics.registry).decode()
    assert rerun[0].replays > 0
    assert set(reasons) == {"a decode step of more than 4 sequences"}
    assert f'slalom:steps_without_graph_total{{reason="{next(iter(reasons))}"}} {float(reasons.total())}' in shown
    assert 'slalom:kernel_compilations_total{engine="0",model_name="tiny"} 2.0' in shown


@needs_two_cores
def test_multiplexed_tokens_are_the_plain_ones_under_random_chunking(rerun: list[Rerun]) -> None:
    """Chunks of any length, of one token too, beside decodes on the other lane; all of them are replays."""
    draw = random.Random(11)
    prompts = [[draw.randrange(256) for _ in range(draw.choice([1, 16, 17, 25, 33, 49, 97]))] for _ in range(24)]
    with engine_on(mixed(), eager=True) as engine:
        expected = [send(engine, prompt).wait().tokens for prompt in prompts]
    for budget in (16, 24, 48):
        role = {"role": Role.MULTIPLEXED, "batching": Batching.CHUNKED, "chunk_tokens": budget, "split": 0}
        with engine_on(mixed(**role), tables_of=cores(len(CORES)), prefix_cache=False) as engine:
            callers = [send(engine, prompt) for prompt in prompts]
            assert [caller.wait().tokens for caller in callers] == expected
            lanes = [lane.runner.executor for lane in engine.instances._lanes]
        assert [dict(lane.without_graph) for lane in lanes] == [{}, {}]


@pytest.mark.slow
def test_a_prompts_last_token_never_disturbs_the_decode_lane(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chunk looks like a decode step. 3,000 decode steps of lane 1 beside such chunks on lane 0, all replayed."""
    monkeypatch.setattr(CompiledKernels, "replayable", True)
    device = make_device("cpu")
    host = LocalHost(runner, device, Lanes(device, [device.total]), GraphSizes(128, 4, 4), Rerun)
    lane0, lane1 = host.executor(0), host.executor(1)
    steps = [Spans.of([span]) for span in prefilled(runner, 4)]
    plain = LocalExecutor(runner, host.lanes, 1)
    layers = (0, runner.n_layers)

    def tokens(executor: LocalExecutor, spans: Spans) -> list[int]:
        return executor.run(spans, layers, [COLD], [0])

    expected = [tokens(plain, spans) for spans in steps]
    assert len({tuple(e) for e in expected}) > 1
    chunk = with_prompts([Span([9], 20, [60, 61])], 1)
    wrong: list[int] = []
    stop = threading.Event()

    def prompts() -> None:
        alone = tokens(LocalExecutor(runner, host.lanes, 0), chunk)
        while not stop.is_set():
            if tokens(lane0, chunk) != alone:
                wrong.append(-1)

    thread = threading.Thread(target=prompts)
    thread.start()
    for k in range(3000):
        if tokens(lane1, steps[k % 4]) != expected[k % 4]:
            wrong.append(k)
    stop.set()
    thread.join()
    assert wrong == []
    assert not lane0.without_graph
    assert not lane1.without_graph
