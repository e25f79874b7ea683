"""The profile file: what it refuses, what it keeps, and that Python and packed tables agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import SlalomError
from engine.latency import Profile, list_profiles, pack
from engine.latency.evaluate import prefill_s


def content(**changes: Any) -> dict[str, Any]:
    """A shipped profile as parsed JSON with some fields replaced."""
    return json.loads(Profile.load("llama-8b-a100").to_json()) | changes


def written(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_save_and_load_keep_every_digit(tmp_path: Path) -> None:
    profile = Profile.load("opt-13b-a100-tp1")
    assert Profile.load(profile.save(tmp_path / "a" / "copy.json")) == profile
    with pytest.raises(SlalomError, match="can be written"):
        profile.save(tmp_path / "a" / "copy.json" / "no folder.json")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["copy.json"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kv_tokens": 0}, "kv_tokens"),
        ({"kv_tokens": 1.5}, "kv_tokens"),
        ({"tp": True}, "tp"),
        ({"tp": "1"}, "tp"),
        ({"colour": 1}, "colour"),
        ({"name": "../etc"}, "name"),
        ({"shares": []}, "shares"),
        ({"total_sms": 200}, "mine.json"),
        ({"step_overhead_s": float("nan")}, "step_overhead_s"),
        ({"switch_s": float("inf")}, "switch_s"),
        ({"format": 2}, "format"),
    ],
)
def test_bad_fields_are_named(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(SlalomError) as caught:
        Profile.load(written(tmp_path, content(**changes)))
    assert field in caught.value.field
    assert "mine.json" in caught.value.field


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"name": 1}'])
def test_files_that_are_no_profile_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SlalomError):
        Profile.load(written(tmp_path, text))


def test_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(SlalomError, match="llama-8b-a100"):
        Profile.load("gpt-5")


def test_knots_must_ascend(tmp_path: Path) -> None:
    data = content()
    data["shares"][-1] |= {"knot_tokens": [512, 256], "knot_s": [0.1, 0.2]}
    with pytest.raises(SlalomError, match="ascend"):
        Profile.load(written(tmp_path, data))


def test_prefill_faster_than_the_device_is_refused(tmp_path: Path) -> None:
    """312 TFLOP/s and 6.98e9 parameters allow 44.7 us per prompt token, no less."""
    data = content()
    floor = 2 * data["roofline"]["params"] / 312e12
    data["shares"][-1]["prefill_s"] = [0.0, 0.0, 0.97 * floor, 0.0]
    with pytest.raises(SlalomError, match="roofline"):
        Profile.load(written(tmp_path, data))
    data["shares"][-1]["prefill_s"] = [0.0, 0.0, 0.995 * floor, 0.0]
    Profile.load(written(tmp_path, data))


def test_decode_faster_than_reading_the_weights_is_refused(tmp_path: Path) -> None:
    """MuxWise's 8B table has a decode step of 5.4 ms: impossible on one A100, which needs 7.4 ms."""
    data = content()
    data["shares"][-1]["decode_small_s"] = [9.8e-9, 2.3e-5, 5.43e-3]
    with pytest.raises(SlalomError, match="weights and KV"):
        Profile.load(written(tmp_path, data))


def test_roofline_grows_with_tensor_parallelism(tmp_path: Path) -> None:
    Profile.load(written(tmp_path, content(tp=2)))
    eight = json.loads(Profile.load("llama-8b-a100-tp8").to_json())
    for tp in (1, 2, 4):
        with pytest.raises(SlalomError, match=r"roofline|weights and KV"):
            Profile.load(written(tmp_path, eight | {"tp": tp}))


def test_packed_rows_repeat_the_last_share() -> None:
    few, many = Profile.load("opt-13b-a100-tp1"), Profile.load("llama-70b-a100-tp8")
    heads, shares = pack([few, many])
    assert shares.shape == (2, 14)
    assert heads["n_shares"].tolist() == [1, 14]
    assert (shares[0] == shares[0, 0]).all()
    assert shares[1]["sms"].tolist() == [share.sms for share in many.shares]
    assert heads[0]["kv_tokens"] == 66144
    assert heads[0]["regime_bs"] == 95


def test_unknown_share_is_refused() -> None:
    with pytest.raises(SlalomError, match="108"):
        Profile.load("llama-70b-a100-tp8").prefill_s(1024, sms=7)


@settings(deadline=None)
@given(st.sampled_from(list_profiles()), st.integers(1, 200_000), st.integers(0, 100_000))
def test_no_prefill_is_below_the_floor_nor_falls_with_cached_tokens(name: str, n: int, r: int) -> None:
    profile = Profile.load(name)
    heads, shares = pack([profile])
    for j in range(len(profile.shares)):
        seconds = prefill_s(heads[0], shares[0, j], float(n) * n, float(n) * r, n)
        assert seconds >= n * profile.floor_s_per_token(profile.shares[j].sms) * (1 - 1e-12)
        assert seconds >= prefill_s(heads[0], shares[0, j], float(n) * n, 0.0, n)


def test_a_batch_costs_less_than_its_prompts_one_by_one() -> None:
    profile = Profile.load("llama-8b-a100")
    heads, shares = pack([profile])
    together = prefill_s(heads[0], shares[0, -1], 4 * 256.0**2, 0.0, 1024)
    assert together < 4 * profile.prefill_s(256)


def test_the_door_imports_no_heavy_library() -> None:
    heavy = ("scipy.optimize", "matplotlib", "pandas", "torch")
    code = f"import sys, engine.latency; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert out.stdout.strip() == "[]"


def test_decode_regimes_switch_at_the_published_batch() -> None:
    profile = Profile.load("opt-13b-a100-tp1")
    below, above = profile.decode_s(50_000, 94), profile.decode_s(50_000, 95)
    overhead = 2e-3 + 50_000 * 1e-7
    assert np.isclose(
        below - overhead,
        (19.934702624895458 + 50_000 * 6.269356524350583e-4 + 94 * 0.03850697740828398) * 1e-3,
    )
    assert np.isclose(
        above - overhead,
        (7.1661889468253595 + 50_000 * 5.798000403396046e-4 + 95 * 0.15831096191764046) * 1e-3,
    )
