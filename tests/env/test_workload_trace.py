"""Invariants of ``Trace``: what is accepted, and what slicing, merging and scaling keep."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trace_stats import describe, idc, reused_tokens

from engine.errors import SlalomError
from env.workload import Trace, assign_classes, concat, merge, scale_rate
from env.workload.hashing import chain, refine


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Random chains of turns over random roots; each chain's prompt contains the one before."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    unit = draw(st.sampled_from([0, 16, 32]))
    n, roots = sum(sizes), len(sizes)
    arrival = np.concatenate([np.sort(rng.exponential(1.0, roots).cumsum()), np.full(n - roots, np.inf)])
    prompt, output = rng.integers(1, 100, n), rng.integers(1, 50, n)
    next_turn, free = np.full(n, -1), roots
    for root, size in enumerate(sizes):
        row = root
        for _ in range(size - 1):
            next_turn[row] = free
            prompt[free] = prompt[row] + output[row] + 5
            row, free = free, free + 1
    count = (prompt + output) // unit if unit else np.zeros(n, int)
    owner = Trace.make(arrival, prompt, output, n_roots=roots, next_turn=next_turn).owner()
    ids = np.concatenate([1000 * owner[i] + np.arange(count[i]) for i in range(n)]) if unit else np.empty(0, int)
    columns = {"hash_n": count, "hash_start": np.cumsum(count) - count, "hashes": chain(ids, count)}
    think = rng.random(n)
    return Trace.make(
        arrival,
        prompt,
        output,
        n_roots=roots,
        next_turn=next_turn,
        think_s=think,
        hash_tokens=unit,
        **columns,
    )


def chain_lengths(trace: Trace) -> list[int]:
    return np.bincount(trace.owner(), minlength=trace.n_roots)[: trace.n_roots].tolist()


@settings(max_examples=60, deadline=None)
@given(traces(), st.floats(0, 5), st.floats(0, 5))
def test_slice_keeps_chains_whole(trace: Trace, a: float, b: float) -> None:
    t0, t1 = min(a, b), max(a, b)
    cut = trace.slice_time(t0, t1)
    roots = trace.arrival_s[: trace.n_roots]
    inside = np.flatnonzero((roots >= t0) & (roots < t1))
    assert cut.n_roots == len(inside)
    assert chain_lengths(cut) == [chain_lengths(trace)[i] for i in inside]
    assert np.allclose(cut.arrival_s[: cut.n_roots], roots[inside] - t0)


@settings(max_examples=60, deadline=None)
@given(traces(), st.data())
def test_take_gives_exactly_n_and_cuts_only_the_last_chain(trace: Trace, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, trace.n))
    cut = trace.take(n)
    assert cut.n == n
    assert chain_lengths(cut)[:-1] == chain_lengths(trace)[: cut.n_roots - 1]


@settings(max_examples=40, deadline=None)
@given(traces(), st.data())
def test_compact_changes_nothing_but_storage(trace: Trace, data: st.DataObject) -> None:
    part = trace.take(data.draw(st.integers(1, trace.n)))
    small = part.compact()
    assert len(small.hashes) <= len(part.hashes)
    assert np.array_equal(reused_tokens(small), reused_tokens(part))


@settings(max_examples=60, deadline=None)
@given(traces(), traces())
def test_merge_keeps_every_chain_and_reuse_within_but_not_across(a: Trace, b: Trace) -> None:
    both = merge([a, b])
    assert both.n == a.n + b.n
    assert sorted(chain_lengths(both)) == sorted(chain_lengths(a) + chain_lengths(b))
    assert both.think_s.sum() == pytest.approx(a.think_s.sum() + b.think_s.sum())
    if a.hash_tokens and b.hash_tokens:
        assert reused_tokens(both).sum() == reused_tokens(a).sum() + reused_tokens(b).sum()


@settings(max_examples=40, deadline=None)
@given(traces(), traces())
def test_concat_plays_one_after_the_other(a: Trace, b: Trace) -> None:
    joined = concat([a, b], gap_s=2.0)
    assert (np.diff(joined.arrival_s[: joined.n_roots]) >= 0).all()
    assert joined.duration_s == pytest.approx(a.duration_s + 2.0 + b.duration_s)


def test_scale_rate_reaches_the_rate_and_records_the_factor() -> None:
    arrivals = np.cumsum(np.random.default_rng(0).exponential(2.0, 500))
    ones = np.ones(500, int)
    trace = scale_rate(Trace.make(arrivals, ones, ones), 4.0)
    assert describe(trace)["rate"] == pytest.approx(4.0 * 500 / 499)
    assert np.allclose(trace.arrival_s, arrivals * trace.meta["time_factor"])
    again = scale_rate(trace, 2.0)
    assert np.allclose(again.arrival_s, arrivals * again.meta["time_factor"])


BASE = {
    "arrival_s": [0.0, 1.0, np.inf],
    "prompt": [5, 5, 9],
    "output": [1, 2, 3],
    "n_roots": 2,
    "next_turn": [2, -1, -1],
}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"arrival_s": [1.0, 0.0, np.inf]}, "arrival_s[1]"),
        ({"arrival_s": [np.nan, 0.0, np.inf]}, "arrival_s[0]"),
        ({"arrival_s": [-1.0, 0.0, np.inf]}, "arrival_s[0]"),
        ({"arrival_s": [0.0, 1.0, 2.0]}, "arrival_s[2]"),
        ({"prompt": [5, 0, 9]}, "prompt[1]"),
        ({"output": [1, 2, -3]}, "output[2]"),
        ({"prompt": [5, 2**31, 9]}, "prompt"),
        ({"prompt": [5.5, 1.0, 9.0]}, "prompt"),
        ({"prompt": [5, 5]}, "prompt"),
        ({"cls": [0, -1, 0]}, "cls[1]"),
        ({"ttft_s": [0.0, 1.0, 1.0]}, "ttft_s[0]"),
        ({"think_s": [np.inf, 0.0, 0.0]}, "think_s[0]"),
        ({"next_turn": [-1, -1, -1]}, "next_turn[2]"),
        ({"next_turn": [2, 2, -1]}, "next_turn[2]"),
        ({"next_turn": [1, -1, -1]}, "next_turn[0]"),
        ({"next_turn": [-1, -1, 2]}, "next_turn[0]"),
        ({"hash_tokens": 24}, "hash_tokens"),
        ({"hash_tokens": 16, "hash_n": [1, 0, 0]}, "hash_start[0]"),
        ({"hashes": [7], "hash_n": [1, 0, 0]}, "hash_n[0]"),
        ({"n_roots": 4}, "n_roots"),
    ],
)
def test_bad_columns_are_refused_by_name(change: dict, field: str) -> None:
    columns = {k: np.array(v) if isinstance(v, list) else v for k, v in (BASE | change).items()}
    if "hashes" in columns:
        columns["hashes"] = columns["hashes"].astype(np.uint64)
    with pytest.raises(SlalomError) as error:
        Trace.make(**columns)
    assert error.value.field.startswith(f"trace.{field}")


def test_take_more_than_there_is_says_how_many_there_are() -> None:
    trace = Trace.make(np.arange(3.0), np.ones(3, int), np.ones(3, int))
    with pytest.raises(SlalomError, match="at most 3"):
        trace.take(4)


def test_classes_follow_their_shares_and_turns_inherit() -> None:
    n = 4000
    arrival = np.concatenate([np.arange(n / 2), np.full(n // 2, np.inf)])
    next_turn = np.concatenate([np.arange(n // 2, n), np.full(n // 2, -1)])
    trace = Trace.make(arrival, np.ones(n, int), np.ones(n, int), n_roots=n // 2, next_turn=next_turn)
    labelled = assign_classes(trace, [1, 0, 3], seed=5)
    assert np.array_equal(labelled.cls[: n // 2], labelled.cls[n // 2 :])
    assert np.bincount(labelled.cls, minlength=3) / n == pytest.approx([0.25, 0, 0.75], abs=0.03)
    assert np.array_equal(labelled.cls, assign_classes(trace, [1, 0, 3], seed=5).cls)
    for bad in ([], [0, 0], [-1, 2], [np.nan]):
        with pytest.raises(SlalomError):
            assign_classes(trace, bad, seed=0)


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=12))
@example(rows=[[1, 2, 0], [2, 0, 1]])
def test_chained_hashes_match_exactly_on_common_prefixes(rows: list[list[int]]) -> None:
    count = np.array([len(r) for r in rows])
    hashes = chain(np.array([i for r in rows for i in r], np.int64), count)
    start = np.cumsum(count) - count
    for a in range(len(rows)):
        for b in range(len(rows)):
            for j in range(min(count[a], count[b])):
                same = rows[a][: j + 1] == rows[b][: j + 1]
                assert (hashes[start[a] + j] == hashes[start[b] + j]) == same


def test_refined_hashes_keep_reuse() -> None:
    count = np.array([3, 2, 3])
    start = np.cumsum(count) - count
    hashes = chain(np.array([1, 2, 3, 1, 2, 1, 9, 3]), count)
    arrival, prompt, output = np.arange(3.0), np.array([96, 64, 96]), np.ones(3, int)
    coarse = Trace.make(arrival, prompt, output, hash_n=count, hash_start=start, hashes=hashes, hash_tokens=32)
    fine_start, fine_count, fine = refine(start, count, hashes, 2)
    finer = replace(coarse, hash_start=fine_start, hash_n=fine_count, hashes=fine, hash_tokens=16)
    assert reused_tokens(coarse).tolist() == [0, 64, 32]
    assert reused_tokens(finer).tolist() == [0, 64, 32]


def test_idc_by_hand() -> None:
    times = np.array([0.0, 0.1, 0.2, 1.5, 2.1, 2.2, 3.0])  # counts 3, 1, 2 in full 1-s bins
    assert idc(times, 1.0) == pytest.approx((2 / 3) / 2)
