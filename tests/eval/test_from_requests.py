"""A profile from a request log: what the surrogate served, the fit finds again."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from engine.latency import Profile
from eval.calibrate.cli import app
from eval.calibrate.from_requests import compare, fit, replay
from eval.calibrate.request_log import EngineSettings, RequestLog

TRUE = np.array([8e-5, 1e-3, 9e-8, 1.5e-5, 2e-2, 6e-3])
TIGHT = EngineSettings(16, 512, 6400, True, False, True, 16, {})


def served(settings=TIGHT, n=60, seed=0, gap_s=0.4):
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(gap_s, n))
    arrival -= arrival[0]
    prompt, output = rng.integers(50, 900, n).astype(np.int32), rng.integers(1, 120, n).astype(np.int32)
    empty = RequestLog(arrival, prompt, output, np.ones(n), np.ones(n))
    ttft, tpot = replay(empty, settings, TRUE)
    return RequestLog(arrival, prompt, output, ttft, tpot)


def test_the_fit_finds_coefficients_that_predict_requests_it_has_not_seen():
    log = served()
    start = TRUE * np.array([1.3, 0.8, 1.2, 0.7, 0.8, 1.2])
    found = fit(log, TIGHT, 40, start=start)
    assert found.shared_kv == 0.0
    table = compare(log, replay(log, TIGHT, found.coefficients), slice(40, None))
    assert {row["metric"] for row in table} >= {"ttft_p99", "tpot_mean"}
    assert max(abs(row["error"]) for row in table) < 0.05


def test_a_prompt_that_must_fit_as_a_whole_waits_longer_for_memory():
    loose = TIGHT._replace(whole_prompt=False, chunk_tokens=128, kv_tokens=1600)
    early, late = (served(loose._replace(whole_prompt=whole), gap_s=0.05) for whole in (False, True))
    assert np.isfinite(late.ttft_s).all()
    assert late.ttft_s.max() != early.ttft_s.max()
    ample = TIGHT._replace(kv_tokens=160_000, chunk_tokens=128)
    early, late = (served(ample._replace(whole_prompt=whole), gap_s=0.05) for whole in (False, True))
    np.testing.assert_array_equal(early.ttft_s, late.ttft_s)  # with memory to spare it makes no difference


def test_the_command_writes_a_profile_and_prints_the_held_out_errors(tmp_path):
    log = served(n=30)
    rows = [
        {"arrival": a, "input_tokens": int(p), "output_tokens": int(o), "first_token": a + f,
         "last_token": a + f + (0.0 if o == 1 else t * (o - 1))}
        for a, p, o, f, t in zip(*log[:5], strict=True)
    ]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "engine.yaml").write_text(
        "max_num_seqs: 16\nmax_num_batched_tokens: 512\nkv_tokens: 6400\nenable_prefix_caching: false\n"
        "scheduler_reserve_full_isl: true\nmodel: m\nvllm_version: 0.19.0\n"
    )
    out = tmp_path / "mine.json"
    arguments = ["--from-requests", tmp_path / "log.jsonl", "--engine-config", tmp_path / "engine.yaml", "--out", out]
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout[result.stdout.index("{") :])
    assert (printed["fitted_on"], printed["checked_on"]) == (15, 15)
    profile = Profile.load(out)
    assert (profile.kv_tokens, profile.engine, profile.model) == (6400, "vLLM 0.19.0", "m")
    assert profile.decode_s(1000, 4) == pytest.approx(TRUE[2] * 1000 + TRUE[3] * 4 + TRUE[4], rel=0.2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--from-requests", "log.jsonl", "--device", "cpu"], "--device: got 'cpu'; it does nothing with --from-req"),
        (["--engine", "http://a", "--instances", "2"], "--instances: got 2; it does nothing with --engine"),
        (["--engine", "http://a", "--watch", "--beside", "http://b"], "it does nothing with --watch"),
        (["--model", "dummy:tiny", "--beside", "http://b"], "give it together with --engine"),
        (["--model", "dummy:tiny", "--holdout", "0.2"], "--holdout: got 0.2; give it together with --from-requests"),
    ],
)
def test_what_would_be_ignored_is_refused(arguments, says):
    assert says in str(CliRunner().invoke(app, ["--out", "mine.json", *arguments]).exception)
