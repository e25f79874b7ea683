"""Arrival processes, lengths, sessions, prefixes and specs against theory and published figures."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter
from scipy.stats import kstest, spearmanr

from engine.errors import SlalomError
from env.workload import SPLIT_NAMES, parse_workload
from env.workload.arrivals import ArrivalSpec, on_clock, weibull_shape
from env.workload.presets import LengthsSpec, preset, preset_facts, preset_names
from env.workload.stats import describe, gap_cv, idc

ARRIVAL: TypeAdapter = TypeAdapter(ArrivalSpec)
LENGTHS: TypeAdapter = TypeAdapter(LengthsSpec)
SHARED = Path(os.environ.get("SLALOM_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "traces"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="shared traces are not here")
AZURE_CONV = {"kind": "preset", "name": "azure-conv"}


def times(section: dict, rate: float, n: int, seed: int = 0) -> np.ndarray:
    out = ARRIVAL.validate_python(section).times(rate, n, np.random.default_rng(seed))
    assert len(out) == n
    assert (np.diff(out) >= 0).all()
    assert out[0] >= 0
    return out


@pytest.mark.parametrize(
    ("section", "cv"),
    [
        ({"kind": "poisson"}, 1.0),
        ({"kind": "gamma", "cv": 0.5}, 0.5),
        ({"kind": "gamma", "cv": 4.0}, 4.0),
        ({"kind": "weibull", "cv": 0.5}, 0.5),
        ({"kind": "weibull", "cv": 2.0}, 2.0),
    ],
)
def test_renewal_mean_cv_and_long_run_idc(section: dict, cv: float) -> None:
    out = times(section, 5.0, 200_000)
    assert 200_000 / out[-1] == pytest.approx(5.0, rel=0.03)
    assert gap_cv(out) == pytest.approx(cv, rel=0.05)
    assert idc(out, 100.0) == pytest.approx(cv * cv, rel=0.25)  # renewal theory: IDC tends to CV^2


def test_weibull_shape_of_cv_one_is_exponential_and_small_cvs_solve() -> None:
    assert weibull_shape(1.0) == pytest.approx(1.0)
    assert weibull_shape(np.sqrt(5.0)) == pytest.approx(0.5)  # shape 1/2: G(5)/G(3)^2 - 1 = 5
    assert 0.05 < weibull_shape(30.0) < weibull_shape(0.05) < 50


def test_poisson_gaps_are_exponential() -> None:
    assert kstest(np.diff(times({"kind": "poisson"}, 2.0, 5000)) * 2.0, "expon").pvalue > 0.01


def test_azure_code_like_bursts() -> None:
    """Figures of AzureLLMInferenceTrace_code (2023): IDC 13.1, 70 and 160 at 1, 10 and 60 s; within 35 %."""
    out = times({"kind": "on_off", "on_s": 60, "off_s": 90, "cv": 3.5}, 3.12, 150_000)
    assert [idc(out, w) for w in (1, 10, 60)] == pytest.approx([13.1, 70, 160], rel=0.35)


@pytest.mark.parametrize("off_rate", [0.0, 0.2])
def test_on_off_counts_follow_the_mmpp_formula(off_rate: float) -> None:
    on_s, off_s, rate = 2.0, 3.0, 20.0
    out = times({"kind": "on_off", "on_s": on_s, "off_s": off_s, "off_rate": off_rate}, rate, 600_000)
    a, b = 1 / on_s, 1 / off_s
    peak = rate / (0.4 + 0.6 * off_rate)
    low = peak * off_rate
    limit = 2 * (peak - low) ** 2 * a * b / ((a + b) ** 2 * (peak * b + low * a))
    assert 600_000 / out[-1] == pytest.approx(rate, rel=0.05)
    for window in (0.5, 5.0, 50.0):  # Fischer and Meier-Hellstern 1993, IDC of counts of an MMPP-2
        x = (a + b) * window
        assert idc(out, window) == pytest.approx(1 + limit * (1 - (1 - np.exp(-x)) / x), rel=0.1)


def test_bins_and_sinusoid_put_the_rate_where_they_say() -> None:
    out = times({"kind": "bins", "bin_s": 10, "rates": [0, 1, 3, 0]}, 10.0, 100_000)
    share = np.bincount((out % 40 // 10).astype(int), minlength=4) / len(out)
    assert share == pytest.approx([0, 0.25, 0.75, 0], abs=0.01)
    assert len(out) / out[-1] == pytest.approx(10.0, rel=0.02)
    out = times({"kind": "sinusoid", "amplitude": 0.8, "period_s": 20}, 10.0, 100_000)
    angle = 2 * np.pi * (out % 20) / 20
    assert 2 * np.sin(angle).mean() == pytest.approx(0.8, abs=0.02)  # first Fourier coefficient of lambda(t)
    assert abs(np.cos(angle).mean()) < 0.02


def test_clock_inverts_the_integral_of_the_rate() -> None:
    out = on_clock(np.array([0.0, 1.0, 2.0, 2.5, 9.0]), np.array([0.0, 2.0, 5.0, 6.0]), np.array([1.0, 0.0, 2.0]))
    assert out == pytest.approx([0.0, 1.0, 2.0, 5.25, 8.5])


def test_until_is_the_beginning_of_a_longer_run() -> None:
    process = ARRIVAL.validate_python({"kind": "gamma", "cv": 5.0})
    out = process.until(3.0, 500.0, np.random.default_rng(1))
    longer = process.times(3.0, 4 * len(out), np.random.default_rng(1))
    assert np.array_equal(out, longer[longer < 500.0])


PUBLISHED = {  # mean, p50, p90, p99 in and out, as published with the traces
    "azure-conv": ((1203, 1016, 4075, 4122), (201, 115, 421, 598)),
    "azure-code": ((2028, 1460, 5026, 7436), (27.5, 13, 55, 249)),
    "mooncake-conversation": ((12449, 7284, 28043, 89976), (348, 356, 606, 1166)),
    "servegen-m-large": ((930, 639, 2380, 4149), (151, 49, 460, 718)),
    "servegen-m-small": ((117, 41, 344, 1440), (16.6, 3, 48, 150)),
    "servegen-deepseek-r1": ((1375, 152, 2847, 24820), (1828, 1051, 4348, 13596)),
    "creation": ((308, 309, 400, 566), (1144, 1106, 1708, 2341)),
    "lmsys": ((62, 17, 177, 586), (162, 117, 389, 533)),
    "sharegpt": ((224, 34, 922, 1608), (278, 268, 510, 767)),
    "humaneval": ((156, 135, 261, 362), (66, 54, 127, 195)),
    "loogle": ((27396, 25276, 42469, 45099), (27.5, 21, 44, 219)),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_presets_reproduce_published_lengths(name: str) -> None:
    """Mean within 7 %, p50 and p90 within 4 % (or one token), p99 within 8 %."""
    for tokens, (mean, p50, p90, p99) in zip(
        preset(name).draw(200_000, np.random.default_rng(0)), PUBLISHED[name], strict=True
    ):
        assert tokens.mean() == pytest.approx(mean, rel=0.07)
        assert np.median(tokens) == pytest.approx(p50, rel=0.04, abs=1)
        assert np.percentile(tokens, 90) == pytest.approx(p90, rel=0.04)
        assert np.percentile(tokens, 99) == pytest.approx(p99, rel=0.08)
    assert {"source", "licence"} <= set(preset_facts(name))


def test_presets_without_a_table() -> None:
    rng = np.random.default_rng(0)
    prompt, output = preset("tool-agent").draw(100_000, rng)
    assert prompt.mean() == pytest.approx(8596, rel=0.03)
    assert output.mean() == pytest.approx(182, rel=0.05)
    prompt, output = preset("burstgpt").draw(100_000, rng)
    assert (prompt.mean(), output.mean()) == pytest.approx((763, 348), rel=0.02)
    prompt, _ = preset("longbench").draw(10_000, rng)
    assert (prompt.min(), prompt.max()) == (1900, 2040)
    assert {"azure-conv", "longbench", "tool-agent"} <= set(preset_names())
    assert "longbench-answers" not in preset_names()


def test_creation_keeps_its_rank_correlation() -> None:
    prompt, output = preset("creation").draw(50_000, np.random.default_rng(0))
    assert spearmanr(prompt, output)[0] == pytest.approx(0.713, abs=0.02)


@pytest.mark.parametrize("rho", [-0.6, 0.3, 1.0])
def test_copula_hits_spearman_and_keeps_the_marginals(rho: float) -> None:
    section = {
        "kind": "joint",
        "prompt": {"kind": "lognormal", "median": 500, "mean": 900},
        "output": {"kind": "uniform", "low": 1, "high": 5000},
        "spearman": rho,
    }
    prompt, output = LENGTHS.validate_python(section).draw(200_000, np.random.default_rng(2))
    assert spearmanr(prompt, output)[0] == pytest.approx(rho, abs=0.01)
    assert np.median(prompt) == pytest.approx(500, rel=0.02)
    assert prompt.mean() == pytest.approx(900, rel=0.03)
    assert output.mean() == pytest.approx(2500.5, rel=0.01)


def test_mixture_draws_by_weight() -> None:
    fixed = [{"kind": "fixed", "prompt": p, "output": 1} for p in (10, 20)]
    section = {
        "kind": "mixture",
        "parts": [{"weight": w, "lengths": f} for w, f in zip((1, 3), fixed, strict=True)],
    }
    prompt, _ = LENGTHS.validate_python(section).draw(50_000, np.random.default_rng(0))
    assert (prompt == 20).mean() == pytest.approx(0.75, abs=0.01)


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


def test_shift_moves_rate_and_mix() -> None:
    phases = [
        {"duration": 1, "rate": 1, "weights": [1, 0]},
        {"duration": 1, "rate": 3, "weights": [0, 1]},
        {"duration": 2, "rate": 1, "weights": [1, 0], "ramp": True},
    ]
    lengths = [{"kind": "fixed", "prompt": p, "output": 1} for p in (10, 20)]
    trace = parse_workload({"kind": "shift", "lengths": lengths, "phases": phases}).build(10, 80_000, 0, "train")
    assert trace.duration_s == pytest.approx(8000, rel=0.02)
    quarter = np.minimum((trace.arrival_s // 2000).astype(int), 3)
    # over the ramp the rate falls 3 -> 1: its halves average 2.5 and 1.5 of the total 1 + 3 + 2.5 + 1.5 = 8
    assert np.bincount(quarter) / 80_000 == pytest.approx([1 / 8, 3 / 8, 2.5 / 8, 1.5 / 8], abs=0.01)
    share = [(trace.prompt[quarter == q] == 20).mean() for q in range(4)]
    assert share[:2] == [0, 1]
    # on the ramp, x from 0 to 1, the rate is 3 - 2x and the second model's weight 1 - x
    x = np.linspace(0, 1, 10_001)
    density = (3 - 2 * x) * (1 - x)
    ramp = [density[half].mean() / (3 - 2 * x[half]).mean() for half in (x < 0.5, x >= 0.5)]
    assert share[2:] == pytest.approx(ramp, abs=0.02)


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


def test_a_million_requests_fit_in_memory() -> None:
    spec = parse_workload(KINDS["synthetic"])
    tracemalloc.start()
    spec.build(5.0, 1_000_000, 1, "train")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


SWITCH = {
    "kind": "shift",
    "lengths": [{"kind": "fixed", "prompt": p, "output": 1} for p in (10, 20)],
    "phases": [{"duration": 60, "rate": 1, "weights": [1, 0]}, {"duration": 30, "rate": 2, "weights": [0, 1]}],
    "duration_s": 90,
}


@pytest.mark.parametrize("n", [18_000, 63_000])
def test_phases_of_a_shift_last_their_seconds_whatever_the_length_of_a_run(n: int) -> None:
    trace = parse_workload(SWITCH).build(100.0, n, 0, "train")
    assert trace.duration_s == pytest.approx(n / 100, rel=0.02)
    second = (trace.arrival_s % 90.0) >= 60.0
    np.testing.assert_array_equal(trace.prompt == 20, second)
    counts = np.bincount((trace.arrival_s // 30).astype(int))[: int(n / 100 // 30)]
    # 60 s at one rate and 30 s at twice that, 100 requests/s on average: 75, 75 and 150 a second
    assert counts / 30 == pytest.approx(np.resize([75, 75, 150], len(counts)), rel=0.1)


def test_random_phases_are_drawn_anew_for_every_episode_and_do_not_depend_on_the_length() -> None:
    section = {**SWITCH, "phases": None, "random": {"phases": [3, 3]}}
    spec = parse_workload({key: value for key, value in section.items() if value is not None})
    short, long = (spec.build(50.0, n, 3, "train").meta["phases"] for n in (9_000, 45_000))
    assert long[: len(short)] == short
    episodes = [long[k : k + 3] for k in range(0, len(long), 3)]
    assert [sum(p["duration"] for p in episode) for episode in episodes] == pytest.approx([90.0] * len(episodes))
    assert len({episode[0]["rate"] for episode in episodes}) == len(episodes) == 11


def test_a_run_that_ends_in_the_middle_of_an_episode_says_so() -> None:
    spec = parse_workload(SWITCH)
    assert spec.unfinished(100.0, 18_000) == ""
    assert "30 s after it began (2 complete)" in spec.unfinished(100.0, 21_000)
    assert spec.build(100.0, 21_000, 0, "train").meta["unfinished"] == spec.unfinished(100.0, 21_000)
    assert "unfinished" not in spec.build(100.0, 18_000, 0, "train").meta
    mixed = parse_workload({"kind": "mix", "parts": [{"weight": 1, "workload": SWITCH}] * 2})
    assert "2 complete" in mixed.unfinished(100.0, 21_000)


def test_a_shift_without_a_natural_length_spreads_over_the_run_as_before() -> None:
    spec = parse_workload({key: value for key, value in SWITCH.items() if key != "duration_s"})
    trace = spec.build(100.0, 30_000, 0, "train")
    assert (trace.prompt[trace.arrival_s < 0.66 * trace.duration_s] == 10).all()
    assert spec.unfinished(100.0, 21_000) == ""


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
