"""Steps of an engine read off the gaps between tokens: a small engine with known step times is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.latency.profile import Profile
from eval.calibrate.from_requests import command
from eval.calibrate.gaps import steps_of

CHUNK, BATCH = 2048, 8


def step_s(prompt: int, bs: int, ctx: int) -> float:
    """A mixture of experts in small: decode is concave in the batch; the weights are read once in a fused step."""
    decode = 0.012 + 0.003 * min(bs, 4) + 0.001 * max(bs - 4, 0) + 2e-6 * ctx if bs else 0.0
    prefill = 0.010 + 5e-4 * prompt + 5e-8 * prompt**2 if prompt else 0.0
    return decode + prefill - (0.008 if prompt and bs else 0.0)


def served(n: int, rate: float, *, bundled: bool = False, slow: float = 0.0) -> dict[str, Any]:
    """A benchmark's result: one prompt a step at most, everybody else decodes beside it.

    :param slow: share of steps that take four times as long
    :param bundled: one client in three hears of its tokens two at a time
    """
    dice = np.random.default_rng(0)
    arrival = np.cumsum(dice.exponential(1.0 / rate, n))
    prompt, output = dice.integers(16, 1200, n), dice.integers(4, 60, n)
    stamps: list[list[float]] = [[] for _ in range(n)]
    waiting, running, now = list(range(n)), list[int](), 0.0
    while waiting or running:
        new = waiting[:1] if waiting and arrival[waiting[0]] <= now and len(running) < BATCH else []
        if not new and not running:
            now = float(arrival[waiting[0]])
            continue
        seconds = step_s(int(prompt[new].sum()), len(running), sum(int(prompt[r]) + len(stamps[r]) for r in running))
        now += seconds * (4.0 if slow and dice.random() < slow else 1.0)
        for r in running + new:
            stamps[r].append(now + float(dice.uniform(0.0, 2e-4)))
        waiting = waiting[len(new) :]
        running = [r for r in running + new if len(stamps[r]) < output[r]]
    if bundled:
        stamps = [[s[0], *s[2:-1:2], s[-1]] if r % 3 == 0 else s for r, s in enumerate(stamps)]
    return {
        "start_times": arrival.tolist(),
        "input_lens": prompt.tolist(),
        "output_lens": output.tolist(),
        "ttfts": [s[0] - a for s, a in zip(stamps, arrival.tolist(), strict=True)],
        "itls": [np.diff(s).tolist() for s in stamps],
    }


def test_every_step_that_is_told_took_what_it_takes() -> None:
    found = [m for m in steps_of(served(120, 1.0), 120, CHUNK) if m.point.kind != "prefill"]
    assert sum(max(m.repeats, 1) for m in found) > 500
    for m in found:
        true = step_s(m.point.n, m.point.bs, m.point.bs * m.point.ctx)
        assert m.seconds == pytest.approx(true, abs=6e-4)


def test_tokens_that_come_two_at_a_time_are_no_steps() -> None:
    found = [m for m in steps_of(served(120, 1.0, bundled=True), 120, CHUNK) if m.point.kind != "prefill"]
    assert found
    for m in found:
        assert m.seconds == pytest.approx(step_s(m.point.n, m.point.bs, m.point.bs * m.point.ctx), abs=6e-4)


def test_where_steps_scatter_their_means_are_told() -> None:
    """One step in five takes four times as long: 1.6 times on average, while most show nothing of it."""
    found = steps_of(served(240, 1.0, slow=0.2), 240, CHUNK)
    often = [m for m in found if m.point.kind == "decode" and m.repeats >= 100]
    ratios = [m.seconds / step_s(0, m.point.bs, m.point.bs * m.point.ctx) for m in often]
    assert len(ratios) >= 3
    assert float(np.mean(ratios)) == pytest.approx(1.6, rel=0.1)


def test_too_little_is_nothing() -> None:
    log = served(120, 1.0)
    assert steps_of(log, 4, CHUNK) == []
    assert steps_of({key: value for key, value in log.items() if key != "itls"}, 120, CHUNK) == []
    assert steps_of({}, 120, CHUNK) == []


def test_the_command_predicts_the_requests_that_it_has_not_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.json").write_text(json.dumps(served(160, 1.2)), encoding="utf-8")
    (tmp_path / "engine.json").write_text(
        json.dumps(
            {"max_num_seqs": BATCH, "max_num_batched_tokens": CHUNK, "enable_prefix_caching": False, "model": "m"}
        )
    )
    command(tmp_path / "log.json", tmp_path / "engine.json", tmp_path / "found.json", 0.5, True)
    said = json.loads(capsys.readouterr().out)
    assert said["points"]["decode"] > 20
    errors = {row["metric"]: abs(row["error"]) for row in said["table"]}
    assert max(errors[name] for name in ("ttft_p50", "ttft_p90", "tpot_p50", "tpot_p90")) < 0.10
    profile = Profile.load(tmp_path / "found.json")
    assert (profile.model, profile.is_poor, said["poor_fit"]) == ("m", False, False)
    for bs in (1, 4, 8):
        assert profile.decode_s(300 * bs, bs) == pytest.approx(step_s(0, bs, 300 * bs), rel=0.05)
    for n in (64, 300, 1000):
        assert profile.prefill_s(n) == pytest.approx(step_s(n, 0, 0), rel=0.05)
