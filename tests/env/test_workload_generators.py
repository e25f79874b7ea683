"""Every kind of workload: repeatable, split, shaped as published; and specs that are refused."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from trace_stats import describe, idc

from engine.errors import SlalomError
from env.workload import SPLIT_NAMES, parse_workload

AZURE_CONV = {"kind": "preset", "name": "azure-conv"}


KINDS: dict[str, dict] = {
    "synthetic": {"kind": "synthetic", "lengths": AZURE_CONV},
    "on_off": {"kind": "synthetic", "arrival": {"kind": "on_off", "cv": 2}, "lengths": AZURE_CONV},
    "system": {"kind": "synthetic", "lengths": AZURE_CONV, "prefix": {"kind": "system"}},
    "loogle": {
        "kind": "synthetic",
        "lengths": {"kind": "preset", "name": "loogle"},
        "prefix": {"kind": "documents"},
    },
    "rag": {
        "kind": "synthetic",
        "lengths": {"kind": "fixed", "prompt": 30, "output": 200},
        "prefix": {"kind": "rag"},
    },
    "agents": {"kind": "sessions", "preset": "agents"},
    "chat": {"kind": "sessions", "preset": "chat", "max_context": 4096},
    "shift": {"kind": "shift", "lengths": [AZURE_CONV, {"kind": "preset", "name": "creation"}], "random": {}},
    "clients": {"kind": "clients", "preset": "m-large"},
    "mix": {
        "kind": "mix",
        "parts": [
            {"weight": 1, "cls": 1, "workload": {"kind": "sessions", "preset": "chat"}},
            {"weight": 2, "workload": {"kind": "synthetic", "lengths": AZURE_CONV}},
        ],
    },
}


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_kind_repeats_by_seed_and_never_overlaps_by_split(name: str) -> None:
    spec = parse_workload(KINDS[name])
    built = {split: spec.build(3.0, 400, 11, split) for split in SPLIT_NAMES}
    for split, trace in built.items():
        again = spec.build(3.0, 400, 11, split)
        assert trace.n == 400
        assert np.array_equal(trace.arrival_s, again.arrival_s)
        assert np.array_equal(trace.prompt, again.prompt)
        assert np.array_equal(trace.hashes, again.hashes)
    for a, b in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not np.isin(built[a].arrival_s[1 : built[a].n_roots], built[b].arrival_s).any()
        assert not np.isin(built[a].hashes, built[b].hashes).any()
    assert not np.array_equal(built["train"].arrival_s, spec.build(3.0, 400, 12, "train").arrival_s)


@pytest.mark.parametrize("name", sorted(set(KINDS) - {"on_off"}))
def test_rate_is_that_of_open_loop_requests(name: str) -> None:
    trace = parse_workload(KINDS[name]).build(7.0, 20_000, 0, "train")
    assert trace.n_roots / trace.duration_s == pytest.approx(7.0, rel=0.12)


def test_agents_look_like_the_recorded_sessions() -> None:
    trace = parse_workload(KINDS["agents"]).build(1.0, 12_000, 0, "train")
    think = trace.think_s[trace.next_turn >= 0]
    assert np.median(think) == pytest.approx(12, rel=0.05)
    assert np.percentile(think, 90) == pytest.approx(191, rel=0.05)
    assert describe(trace)["reuse"] == pytest.approx(0.956, abs=0.03)
    assert trace.prompt.mean() == pytest.approx(124_183, rel=0.2)
    assert (trace.prompt.astype(int) + trace.output <= 200_000).all()


def test_each_turn_contains_all_that_was_said() -> None:
    trace = parse_workload(KINDS["chat"]).build(2.0, 3000, 0, "train")
    parent = np.flatnonzero(trace.next_turn >= 0)
    child = trace.next_turn[parent]
    said = trace.prompt[parent] + trace.output[parent]
    assert (trace.prompt[child] > said).all()
    assert (trace.hash_n[parent] == said // trace.hash_tokens).all()
    for row, turn in zip(parent[:200], child[:200], strict=True):
        shared = trace.hashes[trace.hash_start[row] :][: trace.hash_n[row]]
        assert np.array_equal(shared, trace.hashes[trace.hash_start[turn] :][: trace.hash_n[row]])
    unit = trace.hash_tokens
    expected = (said // unit * unit).sum() / trace.prompt.sum()  # sessions share nothing with each other
    assert describe(trace)["reuse"] == pytest.approx(expected, abs=1e-9)


def test_system_prompts_are_reused_by_popularity() -> None:
    prefix = {"kind": "system", "prompts": 2, "tokens": 512, "zipf": 1.0, "share": 0.5, "included": False}
    lengths = {"kind": "fixed", "prompt": 88, "output": 20}
    trace = parse_workload({"kind": "synthetic", "lengths": lengths, "prefix": prefix}).build(1, 6000, 0, "train")
    first = trace.hashes[trace.hash_start[trace.prompt == 600]]
    counts = np.sort(np.unique(first, return_counts=True)[1])[::-1]
    assert counts.sum() / 6000 == pytest.approx(0.5, abs=0.03)
    assert counts / counts.sum() == pytest.approx([2 / 3, 1 / 3], abs=0.03)
    assert describe(trace)["reuse"] == pytest.approx(3000 * 512 / trace.prompt.sum(), rel=0.05)


def test_documents_are_asked_about_several_times() -> None:
    trace = parse_workload(KINDS["loogle"]).build(1, 8800, 0, "train")
    documents = np.unique(trace.hashes[trace.hash_start])
    assert 8800 / len(documents) == pytest.approx(11, rel=0.05)
    assert describe(trace)["reuse"] == pytest.approx(1 - 1 / 11, abs=0.02)


def test_clients_keep_their_shares_and_stay_bursty() -> None:
    trace = parse_workload(KINDS["clients"]).build(50.0, 100_000, 0, "train")
    poisson = parse_workload(KINDS["synthetic"]).build(50.0, 100_000, 0, "train")
    assert idc(trace.arrival_s, 10.0) > 3 * idc(poisson.arrival_s, 10.0)
    assert trace.duration_s == pytest.approx(2000, rel=0.01)


def test_mix_binds_classes_and_lasts_as_long_in_every_part() -> None:
    trace = parse_workload(KINDS["mix"]).build(6.0, 12_000, 0, "train")
    roots = trace.cls[: trace.n_roots]
    assert (roots == 1).mean() == pytest.approx(1 / 3, abs=0.02)
    ends = [trace.arrival_s[: trace.n_roots][roots == c].max() for c in (0, 1)]
    assert ends[0] == pytest.approx(ends[1], rel=0.03)


def test_max_context_is_kept_and_counted() -> None:
    spec = parse_workload({"kind": "synthetic", "lengths": AZURE_CONV, "max_context": 2000})
    trace = spec.build(1, 5000, 0, "train")
    assert trace.n == 5000
    assert (trace.prompt + trace.output).max() <= 2000
    assert trace.meta["over_context"] > 500
    hopeless = {
        "kind": "synthetic",
        "lengths": {"kind": "fixed", "prompt": 50, "output": 5},
        "max_context": 20,
    }
    with pytest.raises(SlalomError, match="max_context"):
        parse_workload(hopeless).build(1, 10, 0, "train")


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"kind": "magic"}, "workload"),
        ({"kind": "synthetic", "lengths": AZURE_CONV, "speed": 3}, "speed"),
        ({"kind": "synthetic", "lengths": {"kind": "preset", "name": "nope"}}, "lengths"),
        (
            {"kind": "synthetic", "lengths": AZURE_CONV, "arrival": {"kind": "gamma", "cv": -1}},
            "arrival.gamma.cv",
        ),
        ({"kind": "sessions"}, "turns"),
        (
            {
                "kind": "shift",
                "lengths": [AZURE_CONV],
                "phases": [{"duration": 1, "rate": 1, "weights": [1, 1]}],
            },
            "shift",
        ),
        ({"kind": "clients"}, "clients"),
        ({"kind": "mix", "parts": []}, "parts"),
    ],
)
def test_bad_specs_name_the_field(section: dict, field: str) -> None:
    with pytest.raises(SlalomError) as error:
        parse_workload(section)
    assert field in error.value.field


def test_bad_build_arguments() -> None:
    spec = parse_workload(KINDS["synthetic"])
    for rate, n, split in ((0, 5, "train"), (np.nan, 5, "train"), (1, 0, "train"), (1, 5, "dev")):
        with pytest.raises(SlalomError):
            spec.build(rate, n, 0, split)


def test_a_million_requests_fit_in_memory() -> None:
    spec = parse_workload(KINDS["synthetic"])
    tracemalloc.start()
    spec.build(5.0, 1_000_000, 1, "train")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("shift", {"duration_s": 1e-9}), ("shift", {"random": {"phases": [2, 2**31]}}), ("shift", {"cv": 1e-300}),
        ("synthetic", {"lengths": {"kind": "preset", "name": "azure-conv", "scale": 1e300}}),
        ("synthetic", {"lengths": {"kind": "fixed", "prompt": 2**31, "output": 1}}),
        ("synthetic", {"prefix": {"kind": "rag", "documents": 2**31}}),
        ("synthetic", {"prefix": {"kind": "rag", "hash_tokens": 2**31}}),
        ("synthetic", {"arrival": {"kind": "on_off", "on_s": 1e-9}}),
        ("synthetic", {"arrival": {"kind": "bins", "bin_s": 1.0, "rates": [float("inf")]}}),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_nothing_could_draw_are_refused(kind: str, changes: dict[str, Any]) -> None:
    lengths = {"kind": "fixed", "prompt": 10, "output": 2}
    sections: dict[str, dict[str, Any]] = {
        "synthetic": {"kind": "synthetic", "lengths": lengths},
        "shift": {"kind": "shift", "lengths": [lengths], "random": {}},
    }
    with pytest.raises(SlalomError, match="workload"):
        parse_workload(sections[kind] | changes)
