"""Readers against hand-written files, broken files, and the figures published with the shared traces."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trace_stats import describe, gap_cv, reused_tokens

from engine.errors import SlalomError
from env.workload import Trace, read_trace, write_trace

MOONCAKE = [
    {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 3000, "input_length": 1500, "output_length": 7, "hash_ids": [0, 1, 9]},
    {"timestamp": 3000, "input_length": 600, "output_length": 2, "hash_ids": [4, 1]},
]
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.1805901,20,3\n"
)
BURST = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n7,ChatGPT,0,0,0,API log\n45,GPT-4,1087,230,1317,API log\n"
)


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_mooncake(tmp_path: Path) -> None:
    trace = read_trace(jsonl(tmp_path / "m.jsonl", MOONCAKE), "mooncake", time_unit="ms")
    assert trace.arrival_s.tolist() == [0.0, 3.0, 3.0]
    assert trace.prompt.tolist() == [1100, 1500, 600]
    assert trace.hash_tokens == 512
    assert reused_tokens(trace).tolist() == [0, 1024, 0]  # block 1 after block 4 is another prefix
    assert trace.meta["unit"] == "ms"


def test_equal_stamps_are_spread_within_their_grain(tmp_path: Path) -> None:
    rows = [MOONCAKE[0] | {"timestamp": 3000 * (i // 50)} for i in range(200)]
    path = jsonl(tmp_path / "m.jsonl", rows)
    trace = read_trace(path, "mooncake", time_unit="ms", spread_s=3.0, seed=1)
    assert gap_cv(trace.arrival_s) < 1.5 < gap_cv(read_trace(path, "mooncake", time_unit="ms").arrival_s)
    assert trace.duration_s < 12.0
    again = read_trace(path, "mooncake", time_unit="ms", spread_s=3.0, seed=1)
    assert np.array_equal(trace.arrival_s, again.arrival_s)


def test_azure_datetimes_with_seven_digits(tmp_path: Path) -> None:
    trace = read_trace(text(tmp_path / "a.csv", AZURE), "azure")
    assert trace.arrival_s == pytest.approx([0.0, 0.5000001], abs=1e-9)
    assert trace.output.tolist() == [44, 3]


def test_burstgpt_failures_are_dropped_and_counted(tmp_path: Path) -> None:
    trace = read_trace(text(tmp_path / "b.csv", BURST), "burstgpt")
    assert trace.arrival_s.tolist() == [0.0, 40.0]
    assert trace.meta["dropped"]["zero tokens"] == 1


def test_timed_trace_with_other_names_and_multiplier(tmp_path: Path) -> None:
    rows = [
        {"ts": 1000, "inp": 20, "out": 3, "ids": [1, 2]},
        {"ts": 3000, "inp": 20, "out": 3, "ids": [1, 3]},
    ]
    names = {"time": "ts", "prompt": "inp", "output": "out", "hash_ids": "ids"}
    path = jsonl(tmp_path / "t.jsonl", rows)
    trace = read_trace(path, "timed", columns=names, multiplier=0.001, hash_tokens=16)
    assert trace.arrival_s.tolist() == [0.0, 2.0]
    assert reused_tokens(trace).tolist() == [0, 16]
    with pytest.raises(SlalomError, match="not both"):
        read_trace(path, "timed", columns=names, multiplier=0.001, time_unit="ms")


def test_a_block_size_is_never_guessed_and_must_fit(tmp_path: Path) -> None:
    """Ids of 16 tokens read as 512 made of every prompt a long one that was there before."""
    same = {"input_length": 100, "output_length": 3}
    rows: list[dict[str, Any]] = [{"timestamp": 1000 * k, "hash_ids": [*range(6), k]} | same for k in range(4)]
    path = jsonl(tmp_path / "t.jsonl", rows)
    for format in ("timed", "slalom"):
        with pytest.raises(SlalomError, match="hash_tokens; by these rows it is at most 17"):
            read_trace(path, format, time_unit="ms")
    for size in (None, 512, 18):
        with pytest.raises(SlalomError, match=r"line 1, hash_ids: got '7 ids"):
            read_trace(path, "mooncake", time_unit="ms", hash_tokens=size)
    assert reused_tokens(read_trace(path, "timed", time_unit="ms", hash_tokens=16)).tolist() == [0, 96, 96, 96]
    for row in rows:
        row["hash_tokens"] = 16
    assert read_trace(jsonl(path, rows), "slalom").hash_tokens == 16


def test_sessions_wait_for_their_delay(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 10, "output_length": 5, "session_id": "a"},
        {"timestamp": 500, "input_length": 11, "output_length": 5, "session_id": "b"},
        {"delay_ms": 2500, "input_length": 20, "output_length": 5, "session_id": "a"},
        {"delay_ms": 100, "input_length": 30, "output_length": 5, "session_id": "a"},
    ]
    trace = read_trace(jsonl(tmp_path / "s.jsonl", rows), "slalom")
    assert trace.n_roots == 2
    assert trace.next_turn.tolist() == [2, -1, 3, -1]
    assert trace.think_s.tolist() == [2.5, 0.0, 0.1, 0.0]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    n, roots = 40, 25
    rng = np.random.default_rng(3)
    next_turn = np.full(n, -1)
    next_turn[rng.permutation(roots)[: n - roots]] = np.arange(roots, n)
    start = 4 * rng.integers(0, 6, n)  # six chains of four blocks
    trace = Trace.make(
        np.concatenate([np.arange(roots) * 0.125, np.full(n - roots, np.inf)]),
        rng.integers(1, 999, n),
        rng.integers(1, 99, n),
        n_roots=roots,
        next_turn=next_turn,
        think_s=np.where(next_turn >= 0, rng.integers(1, 99, n) / 4, 0.0),
        cls=rng.integers(0, 3, n),
        ttft_s=np.where(rng.random(n) < 0.5, np.nan, 0.25),
        tpot_s=np.full(n, 0.05),
        hash_start=start,
        hash_n=np.full(n, 4),
        hashes=rng.integers(0, 2**64, 24, dtype=np.uint64),
        hash_tokens=16,
    )
    path = tmp_path / f"t{suffix}"
    write_trace(trace, path)
    back = read_trace(path, "slalom")
    for column in (
        "arrival_s",
        "prompt",
        "output",
        "cls",
        "ttft_s",
        "tpot_s",
        "next_turn",
        "think_s",
        "hash_n",
    ):
        assert np.allclose(getattr(back, column), getattr(trace, column), equal_nan=True), column
    assert back.hash_tokens == 16
    assert np.array_equal(reused_tokens(back), reused_tokens(trace))
    assert not list(tmp_path.glob("*.part"))
    write_trace(trace, path, classes=("chat", "code", "rag"))
    named = read_trace(path, "slalom", classes=("chat", "code", "rag"))
    assert np.array_equal(named.cls, trace.cls)
    with pytest.raises(SlalomError, match="class"):
        read_trace(path, "slalom", classes=("chat",))


def test_unit_is_never_guessed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "m.jsonl", MOONCAKE)
    with pytest.raises(SlalomError) as error:
        read_trace(path, "mooncake")
    assert "ms: 3 s long, 0.6667 req/s" in error.value.fix
    assert "s: 3,000 s long" in error.value.fix


def broken(rows: list[dict], index: int, **change: object) -> str:
    copies = [dict(row) for row in rows]
    copies[index].update(change)
    return "".join(json.dumps(row) + "\n" for row in copies)


@pytest.mark.parametrize(
    ("content", "format", "place"),
    [
        ("", "mooncake", "x: got 'no rows'"),
        ("", "azure", "x: got 'empty file'"),
        (json.dumps(MOONCAKE[0]) + '\n{"timestamp": 5, "inp', "mooncake", "line 2"),
        ("[1]\n", "mooncake", "line 1"),
        (broken(MOONCAKE, 1, input_length=-4), "mooncake", "line 2, prompt"),
        (broken(MOONCAKE, 1, output_length=0), "mooncake", "line 2, output"),
        (broken(MOONCAKE, 1, input_length=1.5), "mooncake", "line 2, prompt"),
        (broken(MOONCAKE, 1, input_length="many"), "mooncake", "line 2, prompt"),
        (broken(MOONCAKE, 2, timestamp=float("nan")), "mooncake", "line 3, time"),
        (broken(MOONCAKE, 2, timestamp=None), "mooncake", "line 3, time"),
        (broken(MOONCAKE, 2, timestamp=2), "mooncake", "line 3, time"),
        (broken(MOONCAKE, 2, hash_ids="0 1"), "mooncake", "line 3"),
        (broken([{"timestamp": 1, "input_length": 3}], 0), "mooncake", "column output_length"),
        (AZURE.replace("ContextTokens", "Tokens"), "azure", "column ContextTokens"),
        (AZURE + "2023-11-16 18:15:48.0\n", "azure", "line 4"),
        (AZURE + "yesterday,1,1\n", "azure", "line 4, time"),
        (AZURE + "2023-11-16 18:15:48.0,-3,1\n", "azure", "line 4, prompt"),
        (broken(MOONCAKE, 0, session_id="a", delay=3), "mooncake", "line 1"),
        (broken(MOONCAKE, 1, session_id=["a"]), "mooncake", "line 2, session"),
        (broken(MOONCAKE, 1, input_length=True), "mooncake", "line 2, prompt"),
        (broken(MOONCAKE, 1, input_length=[5]), "mooncake", "line 2, prompt"),
        (broken(MOONCAKE, 1, slo_ttft_ms=-1), "slalom", "line 2, slo_ttft_ms"),
        (broken(MOONCAKE, 1, **{"class": ["a"]}), "slalom", "line 2, cls"),
        (broken(MOONCAKE, 1, hash_tokens=[16]), "slalom", "line 2, hash_tokens"),
    ],
)
def test_flaws_are_named(tmp_path: Path, content: str, format: str, place: str) -> None:
    path = text(tmp_path / "x", content)
    with pytest.raises(SlalomError) as error:
        read_trace(path, format, time_unit=None if format == "azure" else "ms")
    assert place in str(error.value)
    assert error.value.fix


def test_cut_gzip_and_missing_file(tmp_path: Path) -> None:
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in MOONCAKE * 500).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(SlalomError, match="fetch the file again"):
        read_trace(tmp_path / "cut.jsonl.gz", "mooncake", time_unit="ms")
    with pytest.raises(SlalomError, match="exists"):
        read_trace(tmp_path / "none", "mooncake", time_unit="ms")
    with pytest.raises(SlalomError, match="mooncake, timed"):
        read_trace(tmp_path / "none", "csv")


def test_max_context_drops_and_counts(tmp_path: Path) -> None:
    trace = read_trace(jsonl(tmp_path / "m.jsonl", MOONCAKE), "mooncake", time_unit="ms", max_context=1200)
    assert trace.prompt.tolist() == [1100, 600]
    assert trace.meta["dropped"]["over max_context"] == 1


SHARED = Path(os.environ.get("SLALOM_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "traces"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="shared traces are not here")


@needs_shared
@pytest.mark.parametrize(
    ("name", "format", "rows", "rate", "cv", "idc", "prompt", "output"),
    [
        ("azure2023_conv.w1.csv.gz", "azure", 13828, 5.92, 1.08, (1.34, 3.5, 15.4), 1203, 201),
        ("azure2023_code.w1.csv.gz", "azure", 7148, 3.12, 12.7, (13.1, 70, 160), 2028, 27.5),
        ("mooncake_conversation.w1.jsonl.gz", "mooncake", 7689, 3.26, 2.96, (7.6, 2.05, 2.9), 12449, 348),
    ],
)
def test_published_figures_of_real_traces(
    name: str, format: str, rows: int, rate: float, cv: float, idc: tuple, prompt: float, output: float
) -> None:
    trace = read_trace(SHARED / name, format, time_unit="ms" if format == "mooncake" else None)
    facts = describe(trace)
    assert facts["n"] == rows
    assert facts["rate"] == pytest.approx(rate, rel=0.005)
    assert facts["cv"] == pytest.approx(cv, rel=0.01)
    assert [facts["idc"][w] for w in (1, 10, 60)] == pytest.approx(idc, rel=0.08)
    assert facts["prompt"]["mean"] == pytest.approx(prompt, rel=0.001)
    assert facts["output"]["mean"] == pytest.approx(output, rel=0.003)
    if format == "mooncake":
        assert facts["reuse"] == pytest.approx(0.357, abs=0.001)
