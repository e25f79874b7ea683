"""Shipped profiles against the papers' own figures, and against the tables they were derived from."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from published_operators import (
    ELEMENTWISE,
    attention_table,
    layers_linear_s,
    operator_samples,
    vidur_linear_s,
)

from engine.latency import Profile, list_profiles
from engine.latency.fit import DecodeSamples, fit_decode, fit_prefill
from engine.latency.profile import profiles_dir
from engine.latency.published.make import published

ROOT = Path(__file__).resolve().parents[2]
TABLES = Path(os.environ.get("SLALOM_SHARED", ROOT.parent / "shared")) / "profiles"
needs_tables = pytest.mark.skipif(not TABLES.is_dir(), reason="public profile tables are not here")


def numbers(value: object) -> list[float]:
    """Every number of a JSON tree, in order."""
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in numbers(value[key])]
    if isinstance(value, list):
        return [x for item in value for x in numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


def test_shipped_files_are_what_the_tables_give() -> None:
    made = published()
    calibrated = {n for n in list_profiles() if Profile.load(n).provenance.source.startswith("slalom calibrate")}
    assert sorted({*list_profiles()} - calibrated) == sorted(made)
    for name, profile in made.items():
        shipped = json.loads((profiles_dir() / f"{name}.json").read_text())
        fresh = json.loads(profile.to_json())
        np.testing.assert_allclose(numbers(shipped), numbers(fresh), rtol=1e-6, err_msg=name)
        assert shipped["provenance"] == fresh["provenance"]


@pytest.mark.parametrize(
    ("name", "expected_ms"),
    [
        ("opt-13b-a100-tp1", [45.7, 73.1, 130.9, 257.7]),
        ("opt-13b-a100-tp2", [33.5, 51.5, 88.6, 166.5]),
        ("opt-66b-a100-tp4", [69.6, 109.9, 193.8, 374.5]),
    ],
)
def test_distserve_prefill(name: str, expected_ms: list[float]) -> None:
    """DistServe's simulator, its +1 ms per pipeline stage included; from coefficients of three digits."""
    profile = Profile.load(name)
    got = [1e3 * profile.prefill_s(n) for n in (256, 512, 1024, 2048)]
    np.testing.assert_allclose(got, expected_ms, rtol=2.5e-3)


def test_distserve_decode_and_its_overhead() -> None:
    profile = Profile.load("opt-13b-a100-tp1")
    device = profile.model_copy(update={"step_overhead_s": 0.0, "ctx_overhead_s": 0.0})
    assert 1e3 * device.decode_s(16384, 32) == pytest.approx(31.4, abs=0.06)
    assert 1e3 * (profile.decode_s(16384, 32) - device.decode_s(16384, 32)) == pytest.approx(2 + 1.6384)


def test_the_simulated_vllm_is_slower_before_any_policy() -> None:
    """For 512 tokens 1.33 times at 13B TP1 and 1.50 times at 66B TP4, without the 1 ms."""
    for name, ratio in (("opt-13b-a100-tp1", 1.33), ("opt-66b-a100-tp4", 1.50)):
        ours, theirs = Profile.load(name).prefill_s(512), Profile.load(f"{name}-vllm").prefill_s(512)
        assert (theirs - 1e-3) / (ours - 1e-3) == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize(
    ("ctx_k", "bs", "decode_sms", "worst_ms", "prefill_sms", "prefill_8k_ms"),
    [
        (32, 32, 16, 66.7, 88, 986),
        (256, 64, 32, 79.1, 72, 1137),
        (32, 32, 32, 40.9, 72, 1137),
        (64, 64, 48, 44.7, 56, 1368),
        (256, 64, 96, 46.2, 8, 8254),
    ],
)
def test_muxwise_worked_table(
    ctx_k: int, bs: int, decode_sms: int, worst_ms: float, prefill_sms: int, prefill_8k_ms: float
) -> None:
    """Worst decode (guard 1.2) and 8K prefill on the remaining SMs, rounded down to a row of the table."""
    profile = Profile.load("llama-70b-a100-tp8")
    guard = profile.shares[profile.row(decode_sms)].guard
    assert 1e3 * guard * profile.decode_s(ctx_k * 1024, bs, decode_sms) == pytest.approx(worst_ms, abs=0.06)
    assert 1e3 * profile.prefill_s(8192, sms=prefill_sms) == pytest.approx(prefill_8k_ms, abs=1.0)


def test_muxwise_floors_prompts_at_512_tokens() -> None:
    profile = Profile.load("llama-70b-a100-tp8")
    assert profile.prefill_s(100) == pytest.approx(profile.prefill_s(512), rel=1e-3)


def test_8b_slowdowns_by_share() -> None:
    """Solo slow-downs read off the same table by others: 4K prefill, and batch 32 with 64K context tokens."""
    profile = Profile.load("llama-8b-a100-tp8")
    for sms, decode in ((8, 3.42), (16, 2.04), (24, 1.61), (32, 1.34), (48, 1.22), (64, 1.06), (80, 1.03)):
        ratio = profile.decode_s(65536, 32, sms) / profile.decode_s(65536, 32)
        assert ratio == pytest.approx(decode, abs=0.02)
    for sms, prefill in ((8, 7.02), (16, 3.74), (32, 1.97), (64, 1.26)):
        assert profile.prefill_s(4096, sms=sms) / profile.prefill_s(4096) == pytest.approx(prefill, rel=0.08)


@pytest.mark.parametrize("name", ["llama-8b-a100", "llama-8b-h100"])
def test_fewer_sms_are_never_faster(name: str) -> None:
    profile = Profile.load(name)
    for n in (64, 1024, 8192):
        times = [profile.prefill_s(n, sms=share.sms) for share in profile.shares]
        assert times == sorted(times, reverse=True)
    times = [profile.decode_s(40_000, 32, share.sms) for share in profile.shares]
    assert times == sorted(times, reverse=True)


def test_capacity_follows_from_model_and_memory() -> None:
    assert Profile.load("llama-8b-a100").kv_bytes_per_token == 131072
    assert Profile.load("llama-70b-a100-tp8").kv_bytes_per_token == 327680
    assert Profile.load("opt-13b-a100-tp1").kv_bytes_per_token == 819200
    for name in list_profiles():
        profile = Profile.load(name)
        used = profile.kv_tokens * profile.kv_bytes_per_token + profile.roofline.weight_bytes
        assert used < profile.tp * 80 * 2**30, name


@needs_tables
@pytest.mark.parametrize(
    ("hardware", "bs_ms", "fixed_ms", "ctx_ms"),
    [("h100-80gb", 0.202, 29.8, 1.78e-4), ("a100-80gb", 0.200, 44.2, 3.10e-4)],
)
def test_splitwise_decode(hardware: str, bs_ms: float, fixed_ms: float, ctx_ms: float) -> None:
    """Llama-2-70B, TP 8: an independent fit of the same rows found these coefficients, error 1.5 to 2.2 %."""
    pd = pytest.importorskip("pandas")
    rows = pd.read_csv(TABLES / "splitwise-sim" / "perf_model.csv")
    rows = rows[(rows.model == "llama2-70b") & (rows.hardware == hardware) & (rows.tensor_parallel == 8)]
    bs = rows.batch_size.to_numpy()
    fit = fit_decode(DecodeSamples(bs * rows.prompt_size.to_numpy(), bs, rows.token_time.to_numpy() * 1e-3))
    assert 0.014 < fit.held_out_mape < 0.022
    assert 1e3 * fit.small[2] == pytest.approx(fixed_ms, rel=0.01)
    step = fit.small[0] * 16384 + fit.small[1] * 32 + fit.small[2]
    assert 1e3 * step == pytest.approx(fixed_ms + 32 * bs_ms + 16384 * ctx_ms, rel=0.02)
    shipped = Profile.load(f"llama2-70b-{hardware.split('-')[0]}-tp8")
    assert shipped.decode_s(16384, 32) == pytest.approx(step, rel=1e-4)


@needs_tables
@pytest.mark.parametrize("name", ["llama-8b-a100", "llama-8b-h100"])
def test_8b_profiles_come_from_the_operator_tables(name: str) -> None:
    pytest.importorskip("pyarrow")
    if name.endswith("a100"):
        attention, bandwidth = TABLES / "aisimulate/a100_sxm/attention/vllm/0.14.0", 2.039e12
        linear = vidur_linear_s(TABLES / "vidur/a100/Meta-Llama-3-8B/mlp.csv")
    else:
        attention, bandwidth = TABLES / "aisimulate/h100_sxm/attention/vllm/0.24.0", 3.35e12
        linear = layers_linear_s(TABLES / "llmservingsim/H100/Llama-3.1-8B-tp1-layers.csv")
        small = vidur_linear_s(TABLES / "vidur/h100/Llama-2-7b-hf/mlp.csv", ELEMENTWISE)
        linear = linear + np.interp(linear.index, small.index, small.to_numpy())
    prefill, decode = operator_samples(
        linear,
        attention_table(attention / "context_attention_perf.parquet", 32, 8, 128),
        attention_table(attention / "generation_attention_perf.parquet", 32, 8, 128),
        n_layers=32,
        head_bytes=128256 * 4096 * 2,
        memory_bytes_per_s=bandwidth,
    )
    p, d, shipped = fit_prefill(prefill), fit_decode(decode), Profile.load(name)
    assert p.held_out_mape < 0.04
    assert d.held_out_mape < 0.03
    whole = shipped.shares[-1]
    np.testing.assert_allclose(whole.prefill_s[::2], p.coefficients[::2], rtol=1e-5)
    np.testing.assert_allclose(whole.decode_small_s, d.small, rtol=1e-5)
    assert shipped.fit is not None
    assert shipped.fit.prefill_mape == pytest.approx(p.held_out_mape, abs=1e-4)
