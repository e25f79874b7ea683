"""Workloads drawn from recorded traces and files of generators."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from trace_stats import describe, gap_cv

from engine.errors import SlalomError
from env.workload import SPLIT_NAMES, parse_workload
from env.workload.steady import most_of

SHARED = Path(os.environ.get("SLALOM_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "traces"

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="shared traces are not here")


def small_trace(folder: Path, rows: int = 1000) -> str:
    path = folder / "m.jsonl"
    lines = (
        {"timestamp": 1000 * i, "input_length": 600 + i, "output_length": 1 + i % 7, "hash_ids": [i // 10, i]}
        for i in range(rows)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_trace_kind_cuts_by_time_and_scales_or_swaps(tmp_path: Path) -> None:
    source = {"path": small_trace(tmp_path), "format": "mooncake", "time_unit": "ms"}
    replay = parse_workload({"kind": "trace", "source": source})
    seen = {s: set(np.concatenate([replay.build(2.0, 50, k, s).prompt for k in range(30)])) for s in SPLIT_NAMES}
    assert max(seen["train"]) < 1200 <= min(seen["valid"])
    assert max(seen["valid"]) < 1400 <= min(seen["test"])
    trace = replay.build(2.0, 50, 0, "train")
    assert describe(trace)["rate"] == pytest.approx(2.0, rel=0.03)
    assert trace.meta["time_factor"] == pytest.approx(0.5)
    with pytest.raises(SlalomError, match="at most"):
        replay.build(2.0, 500, 0, "test")
    swap = parse_workload({"kind": "trace", "source": source, "arrival": {"kind": "poisson"}, "run": 20})
    trace = swap.build(2.0, 500, 0, "test")
    assert (np.diff(trace.prompt.reshape(-1, 20), axis=1) == 1).all()
    assert describe(trace)["reuse"] > 0.5  # neighbours still share their first block
    assert gap_cv(trace.arrival_s) == pytest.approx(1, abs=0.15)


def test_empirical_lengths_and_replayed_arrivals(tmp_path: Path) -> None:
    source = {"path": small_trace(tmp_path), "format": "mooncake", "time_unit": "ms"}
    section = {
        "kind": "synthetic",
        "arrival": {"kind": "replay", "source": source},
        "lengths": {"kind": "empirical", "source": source, "run": 8},
    }
    trace = parse_workload(section).build(4.0, 160, 0, "valid")
    assert np.diff(trace.arrival_s) == pytest.approx(0.25)
    assert ((trace.prompt >= 1200) & (trace.prompt < 1400)).all()
    assert (np.diff(trace.prompt.reshape(-1, 8), axis=1) == 1).all()
    longest = most_of(lambda n: parse_workload(section).build(4.0, n, 0, "valid"), 5_000)
    assert longest == 200  # who asks how long a run can be hears where the arrivals end


@needs_shared
def test_mooncake_bodies_on_poisson_keep_their_reuse() -> None:
    source = {
        "path": str(SHARED / "mooncake_conversation.w1.jsonl.gz"),
        "format": "mooncake",
        "time_unit": "ms",
        "spread_s": 3,
        "max_context": 131072,
    }
    replayed = describe(parse_workload({"kind": "trace", "source": source}).build(3.0, 4000, 0, "train"))
    section = {"kind": "trace", "source": source, "arrival": {"kind": "poisson"}}
    swapped = describe(parse_workload(section).build(3.0, 4000, 0, "train"))
    assert swapped["reuse"] == pytest.approx(replayed["reuse"])
    assert 0.25 < swapped["reuse"] < 0.4
    assert replayed["cv"] == pytest.approx(1.0, abs=0.15)  # near Poisson once the 3-s stamps are spread
    section["run"] = 5
    shuffled = describe(parse_workload(section).build(3.0, 4000, 0, "train"))
    assert shuffled["reuse"] > swapped["reuse"]  # runs may repeat bodies, which an infinite cache finds again


@needs_shared
def test_servegen_files_give_the_published_window_mix() -> None:
    section = {
        "kind": "clients",
        "rates_path": str(SHARED / "servegen_deepseek-r1.rates.h00-18.csv.gz"),
        "lengths_path": str(SHARED / "servegen_deepseek-r1.lengths.h00-18.jsonl.gz"),
    }
    spec = parse_workload(section)
    outputs = np.concatenate([spec.build(10.0, 4000, seed, "train").output for seed in range(12)])
    assert outputs.mean() == pytest.approx(1828, rel=0.15)
