"""Sequences of a forward pass as columns: the batch is that of the plain definition, and a lane's columns are true."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from live_cases import GREEDY, KV, PROMPTS, engine_on, mixed, send
from strategies import Case, RequestSpec
from torch.utils._python_dispatch import TorchDispatchMode

from engine.core import loop
from engine.core.columns import Kind
from engine.core.events import interrupt
from engine.core.events.slots import slots_of
from engine.core.kinds import Batching, Role
from engine.core.setup import ClusterOptions, InstanceSpec, LinkSpec
from engine.core.state import ClusterState
from engine.jit.rows import addresses
from engine.kernels import Batch, Span, Spans
from engine.kernels.static import StaticBatch
from engine.kernels.work import Tiling, work_list
from engine.live.steps import LaneRunner
from engine.workers.wire import step_from, step_message

PAGE = 16


@st.composite
def span_lists(draw: st.DrawFn) -> list[Span]:
    """Decodes and chunks on blocks of their own, some with more blocks than they need."""
    found: list[Span] = []
    for _ in range(draw(st.integers(1, 6))):
        new, start = draw(st.sampled_from([1, 1, 2, 16, 17, 40])), draw(st.integers(0, 70))
        need = -(-(start + new) // PAGE) + draw(st.integers(0, 2))
        blocks = draw(st.lists(st.integers(0, 999), min_size=need, max_size=need))
        found.append(Span([draw(st.integers(0, 2**17)) for _ in range(new)], start, blocks, draw(st.booleans())))
    return found


def in_dirty_buffers(spans: list[Span]) -> Spans:
    """The columns as a lane has them: views of larger buffers that still hold what was written before."""
    own = Spans.of(spans)
    blocks = np.full((len(spans) + 3, own.width + 5), 777, np.int32)
    for row, span in zip(blocks, spans, strict=False):
        row[: len(span.blocks)] = span.blocks
    return Spans(own.tokens, own.counts, own.starts, own.sample, own.n_blocks, blocks[: len(spans)])


@given(span_lists(), st.integers(0, 9))
def test_columns_give_the_batch_of_the_plain_definition(spans: list[Span], pad_to: int) -> None:
    columns = in_dirty_buffers(spans)
    batch = Batch.build(columns, block_tokens=PAGE, pad_to=pad_to)
    padding = max(0, pad_to - len(spans))
    tokens = [t for span in spans for t in span.tokens]
    positions = [span.start + k for span in spans for k in range(len(span.tokens))]
    slots = [
        span.blocks[(span.start + k) // PAGE] * PAGE + (span.start + k) % PAGE
        for span in spans
        for k in range(len(span.tokens))
    ]
    ends = np.cumsum([len(span.tokens) for span in spans] + [1] * padding).tolist()
    contexts = [span.start + len(span.tokens) for span in spans] + [0] * padding
    wanted = [span.sample for span in spans] + [True] * padding
    assert batch.tokens.tolist() == tokens + [0] * padding
    assert batch.positions.tolist() == positions + [0] * padding
    assert batch.slots.tolist() == slots + [-1] * padding
    assert batch.query_starts.tolist() == [0, *ends]
    assert batch.context_lens.tolist() == contexts == list(batch.context_tokens)
    assert batch.sample_rows.tolist() == [end - 1 for end, yes in zip(ends, wanted, strict=True) if yes]
    assert batch.query_tokens == (*(len(span.tokens) for span in spans), *[1] * padding)
    assert batch.max_query == max(len(span.tokens) for span in spans)
    assert batch.block_tables.shape == (len(contexts), max(len(span.blocks) for span in spans))
    for row, span in zip(batch.block_tables.tolist(), spans, strict=False):
        assert row[: len(span.blocks)] == span.blocks
    plain = Batch.build(spans, block_tokens=PAGE, pad_to=pad_to)
    for name in ("tokens", "positions", "query_starts", "context_lens", "slots", "sample_rows"):
        mine, theirs = getattr(batch, name), getattr(plain, name)
        assert mine.dtype == theirs.dtype
        assert mine.equal(theirs)
    kept = [getattr(batch, name).clone() for name in ("tokens", "block_tables", "slots", "context_lens")]
    for column in (columns.tokens, columns.counts, columns.starts, columns.n_blocks, columns.blocks):
        column.fill(5)  # the lane's next step
    for name, before in zip(("tokens", "block_tables", "slots", "context_lens"), kept, strict=True):
        assert getattr(batch, name).equal(before), f"{name} is shared with the columns"


@given(span_lists())
def test_columns_cross_the_wire(spans: list[Span]) -> None:
    columns = in_dirty_buffers(spans)
    received, layers, _, _ = step_from(json.loads(json.dumps(step_message(columns, (0, 4), [], []))))
    assert received is not None
    assert layers == (0, 4)
    assert received.decodes == columns.decodes == all(len(s.tokens) == 1 and s.sample for s in spans)
    for name in ("tokens", "counts", "starts", "sample", "n_blocks"):
        mine, theirs = getattr(columns, name), getattr(received, name)
        assert mine.dtype == theirs.dtype
        assert mine.tolist() == theirs.tolist()
    for row, span in zip(received.blocks.tolist(), spans, strict=True):
        assert row[: len(span.blocks)] == span.blocks
    assert step_from(step_message(None, (1, 2), [], []))[0] is None


def test_an_empty_batch_and_spans_without_tokens_or_blocks_are_refused() -> None:
    for spans, why in (
        ([], "empty"),
        ([Span([1], 0, [1]), Span([], 3, [1])], "without tokens"),
        ([Span([1], 0, [1]), Span([1], 16, [1])], "cover"),
    ):
        with pytest.raises(AssertionError, match=why):
            Batch.build(spans, block_tokens=PAGE)


CUTS: dict[str, list[InstanceSpec]] = {
    "chunked and preempted": mixed(kv_tokens=304, chunk_tokens=32),
    "migrated": [InstanceSpec(Role.PREFILL, 0, KV), InstanceSpec(Role.DECODE, 1, KV, link=1)],
    "layer slices": mixed(role=Role.MULTIPLEXED, batching=Batching.LAYERED),
}


@pytest.mark.parametrize("cut", CUTS)
def test_every_step_computes_the_tokens_of_its_requests(cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode tokens are taken from what the request last got, prompts from the request: always its own history; and
    its KV goes where the core's own chain of blocks leads."""
    run, describe, seen = LaneRunner.run, LaneRunner.describe, set()

    def checked(self: LaneRunner, step: Any) -> Any:
        spans, row = step.spans, 0
        if spans is not None:
            for request, start, count in zip(step.requests, spans.starts, spans.counts, strict=True):
                own = request.tokens[start : start + count]
                assert spans.tokens[row : row + count].tolist() == own.tolist()
                assert start + count <= request.n_tokens
                row += count
                seen.add("chunk" if count > 1 else "token")
            assert row == len(spans.tokens)
        return run(self, step)

    def described(self: LaneRunner, words: np.ndarray, i: int, l: int) -> Any:
        step = describe(self, words, i, l)
        if step.spans is not None:
            for request, n, row in zip(step.requests, step.spans.n_blocks, step.spans.blocks, strict=True):
                assert row[:n].tolist() == chain_of(self._state, i, request.slot)
        return step

    monkeypatch.setattr(LaneRunner, "run", checked)
    monkeypatch.setattr(LaneRunner, "describe", described)
    with engine_on(CUTS[cut]) as engine:
        for _ in range(2):  # the second time slots, rows and blocks have been used before
            callers = [send(engine, prompt) for prompt in PROMPTS]
            assert all(len(caller.wait().tokens) == GREEDY.max_tokens for caller in callers)
        assert (engine.state.cluster[0]["n_preempted"] > 0) == (cut == "chunked and preempted")
    assert seen == {"chunk", "token"}


def test_a_request_that_moved_away_and_comes_back_is_found_in_its_new_blocks() -> None:
    """Two prompts in one step; one is decoded elsewhere, where the role changes, while the other takes its blocks."""
    options = ClusterOptions(place_decode=True, hand_over=True)
    specs = tuple(InstanceSpec(Role.MIXED, i, 1024, link=i) for i in range(2))
    links = (LinkSpec(), LinkSpec())
    state, sim = Case(specs, (RequestSpec(40, 200), RequestSpec(40, 200)), links=links, options=options).build()
    words, columns = addresses(state), [loop.step_columns(400, 64) for _ in range(4)]
    started, running, place = np.zeros(10, np.int32), [], [0, 1]

    def settle(now: int) -> None:
        while (asked := loop.ask(words, now, 7, sim.context, sim.candidates, sim.mask))[0] >= 0:
            kind, r, _ = asked
            loop.answer(words, kind, r, 0 if kind == Kind.PLACE_PREFILL else place[r], now)
        running.extend(started[: loop.start_idle(words, now, started)].tolist())
        for slot in (slot for slot in running if slot < 4):
            n, *_ = loop.describe_step(words, addresses(columns[slot]), *divmod(slot, 2))
            for r, blocks, row in zip(columns[slot][0][:n], columns[slot][4], columns[slot][5], strict=False):
                assert row[:blocks].tolist() == chain_of(state, slot // 2, r)

    loop.begin(words, 0, 0)
    loop.begin(words, 1, 0)
    settle(0)
    for now in range(1, 70):
        if now == 60:
            place[1] = 0
            assert interrupt.request_role(words, 1, Role.PREFILL)
        ended, running[:] = list(running), []
        for slot in ended:
            if slot < 4:
                loop.finish_lane(words, *divmod(slot, 2), now)
            elif slot < slots_of(2, 2).switches:
                loop.finish_transfer(words, slot - 4, now)
            else:
                loop.finish_switch(words, slot - slots_of(2, 2).switches)
        settle(now)
    assert state.req["inst"].tolist() == [0, 0]
    assert state.cluster[0]["n_migrated"] == 2


def chain_of(state: ClusterState, i: int, r: int) -> list[int]:
    """Blocks of request ``r``, first one first, counted from the beginning of the pool of instance ``i``."""
    blocks, b = [], int(state.req[r]["tail"])
    for _ in range(int(state.req[r]["blocks"])):
        blocks.append(b - int(state.pool[state.inst[i]["pool"]]["base"]))
        b = int(state.block[b]["parent"])
    return blocks[::-1]


class Copies(TorchDispatchMode):
    """Counts what torch copies."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += "copy" in str(func)
        return func(*args, **(kwargs or {}))


@given(st.lists(span_lists(), min_size=1, max_size=3), st.booleans())
def test_the_input_of_a_graph_is_the_batch_and_arrives_by_one_copy(passes: list[list[Span]], decodes: bool) -> None:
    """Passes one after the other in the same room: nothing of the one before is left."""
    tiling, rows = Tiling(1 if decodes else 4, 64, 5), 256
    if decodes:
        passes = [[Span(s.tokens[:1], s.start, s.blocks) for s in spans] for spans in passes]
    static = StaticBatch(
        rows=rows, sequences=rows if decodes else 8, decodes=decodes, width=16, block_tokens=PAGE, tiling=tiling,
        sm_count=3, device="cpu",
    )  # fmt: skip
    places = {name: getattr(static.batch, name).data_ptr() for name in ("tokens", "slots", "block_tables")}
    assert set(static.batch.slots.tolist()) == {-1}, "the capture would write KV"
    for spans in passes:
        columns = in_dirty_buffers(spans)
        with Copies() as copies:
            batch = static.fill(columns)
        assert copies.n == 1
        assert {name: getattr(batch, name).data_ptr() for name in places} == places, "a graph would read elsewhere"
        plain = Batch.build(columns, block_tokens=PAGE, pad_to=rows if decodes else 0)
        n = plain.n_rows
        for name in ("tokens", "positions", "slots"):
            assert torch.equal(getattr(batch, name)[:n], getattr(plain, name))
        assert batch.tokens[n:].tolist() == batch.positions[n:].tolist() == [0] * (rows - n)
        assert batch.slots[n:].tolist() == [-1] * (rows - n)
        for name in ("context_lens", "query_starts", "block_tables", "sample_rows"):
            assert torch.equal(getattr(batch, name), getattr(plain, name)), name
        lists = work_list(
            np.array(plain.query_tokens), np.array(plain.context_tokens), batch.block_tables.shape[1], tiling
        )
        work = batch.work(tiling)
        for ours, expected in zip((work.items, work.merges), lists, strict=True):
            assert np.array_equal(ours[: len(expected)].numpy(), expected)
            assert not ours[len(expected) :].any(), "an item that is left over would be computed"
