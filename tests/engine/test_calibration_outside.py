"""Engines of others timed from outside: the profile explains the points, and says when it does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from remote_cases import mocks
from waiting import until

from engine.calibration.from_outside import fused_error, profile_of
from engine.calibration.outside import Limits, held_out, measure
from engine.calibration.points import Measured, Point
from engine.errors import SlalomError
from engine.latency.profile import Profile
from engine.remote.discover import EngineFacts, discover
from env.scenario import Scenario
from eval.calibrate.cli import Options, calibrate
from train.cli import Options as TrainOptions
from train.cli import train_policy

FACTS = EngineFacts("http://engine", "m", kv_tokens=4096, max_batch=8, context=1024)
LIMITS = Limits(10.0, 0.05, 512, 8)


def prefill_s(n: int) -> float:
    return 1e-7 * n * n + 2e-4 * n + 5e-3


def decode_s(bs: int, context: int) -> float:
    return 1e-6 * context + 1e-3 * bs + 1e-2


def points(noise: float = 0.0) -> list[Measured]:
    """What an engine of this shape gives; a fused step saves 4 ms."""
    dice = np.random.default_rng(0)

    def figure(point: Point, seconds: float) -> Measured:
        return Measured(point, seconds * float(np.exp(dice.normal(0.0, noise))))

    found = [figure(Point("prefill", n=n, prompts=1), prefill_s(n)) for n in range(8, 512, 24)]
    for bs in range(1, 9):
        for ctx in (20, 200, 400):
            found.append(figure(Point("decode", bs=bs, ctx=ctx), decode_s(bs, bs * ctx)))
            both = prefill_s(128) + decode_s(bs, bs * ctx) - 4e-3
            found.append(figure(Point("fused", n=128, prompts=1, bs=bs, ctx=ctx), both))
    return found


def test_the_profile_explains_the_points() -> None:
    profile = profile_of(points(), FACTS, "x")
    assert profile.prefill_s(300) == pytest.approx(prefill_s(300), rel=1e-3)
    assert profile.decode_s(600, 3) == pytest.approx(decode_s(3, 600), rel=1e-3)
    assert profile.shares[0].fused_shared_s == pytest.approx(4e-3, rel=1e-2)
    assert fused_error(profile, points()) < 1e-3
    assert max(held_out(points(), "prefill"), held_out(points(), "decode")) < 1e-3
    assert held_out(points()[:7], "prefill") == 1.0  # too few to say
    assert (profile.kv_tokens, profile.model, profile.is_poor) == (4096, "m", False)


def test_a_poor_fit_is_marked_and_refused_by_training(tmp_path: Path) -> None:
    profile = profile_of(points(noise=0.5), FACTS, "x")
    assert profile.is_poor
    profile.save(tmp_path / "x.json")
    scenario = Scenario.load("smollm2-2xcpu").with_overrides({"profile": str(tmp_path / "x.json")})
    assert "poor fit" in scenario.poor_fits()[0]
    (tmp_path / "poor.yaml").write_text(scenario.to_yaml(), encoding="utf-8")
    options = TrainOptions(scenario=str(tmp_path / "poor.yaml"), algo="search", budget="1k", out=tmp_path / "run")
    with pytest.raises(SlalomError, match="--accept-poor-fit"):
        train_policy(**vars(options))
    assert not (tmp_path / "run").exists()


def test_a_prompt_and_its_ramp_fit_the_engine() -> None:
    limits = Limits(1.0, 0.05, 10_000, 64).within(FACTS)
    assert (limits.max_batch, limits.max_tokens) == (8, 1024 // 2 - 14 * 9 - 8)  # its KV is 512 tokens a sequence
    assert Limits(1.0, 0.05, 300, 4).within(EngineFacts("http://x", "m")) == Limits(1.0, 0.05, 300, 4)


def test_an_engine_is_timed_until_there_is_enough_and_the_command_says_how_good_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mocks(1, prefill_s=0.001, token_s=0.001) as engines:
        facts = discover(engines[0].url)
        assert (facts.model, facts.context) == ("mock", 4096)
        measured, stopped = measure(facts, Limits(60.0, 100.0, 256, 4))  # whatever the noise
        assert stopped == "the held-out error is small enough"
        kinds = [m.point.kind for m in measured]
        assert min(kinds.count("prefill"), kinds.count("decode")) >= 24
        assert kinds.count("fused") > 0
        assert all(m.seconds > 0 for m in measured)
        assert {m.point.bs for m in measured if m.point.kind == "decode"} == {1, 2, 3, 4}

        out = tmp_path / "mock.json"
        calibrate(**vars(Options(out, engine=engines[0].url, budget="20", error=0.5, max_batch=4, as_json=True)))
        said = json.loads(capsys.readouterr().out)
        assert Profile.load(out).is_poor == said["poor_fit"]

        engines[0].set(refuse=True)
        with pytest.raises(SlalomError, match="token ids"):
            measure(facts, LIMITS)
    with pytest.raises(SlalomError, match="--engines"):
        discover(engines[0].url)


def test_engines_on_the_same_hardware_are_kept_busy_meanwhile() -> None:
    with mocks(2, prefill_s=0.001, token_s=0.001) as engines:
        facts, other = (discover(engine.url) for engine in engines)
        limits = Limits(60.0, 100.0, 64, 2)
        measured, _ = measure(facts, limits, beside=[other], beside_share=1.0)
        assert engines[1].set()["most_running"] == 3
        until(lambda: engines[1].set()["running"] == 0)  # and left alone afterwards
        begun = engines[1].set()["begun"]
        measure(facts, limits, beside=[other], beside_share=0.0)
        assert engines[1].set()["begun"] == begun
        assert "1 more engines on its hardware computed for 75% of the time" in (
            profile_of(measured, facts, "x", beside=1, share=0.75).provenance.notes
        )
        engines[1].set(refuse=True)
        with pytest.raises(SlalomError, match="status 503"):
            measure(facts, limits, beside=[other], beside_share=1.0)
