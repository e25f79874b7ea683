"""Calibration: points that survive, a design that looks where it is unsure, a fit that gives back what was measured."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_cases import MODEL, TOKENIZER
from typer.testing import CliRunner

from engine.calibration import Bench, Campaign, Limits, Measured, Point, Store, assemble
from engine.calibration.assemble import plot, predict_s
from engine.calibration.bench import believed
from engine.calibration.design import KINDS, Space, doubts, held_out_error, next_points
from engine.calibration.live import neighbour_time
from engine.calibration.shares import _beside, _Place, measure_share
from engine.errors import SlalomError
from engine.lanes.partitions import make_device
from engine.latency import Profile, pack
from eval.calibrate.cli import _notes, app, parse_seconds

SPACE = Space(max_tokens=256, max_reused=512, max_batch=16, max_context=512, kv_tokens=8192)
FACTS = {"roofline": [1e15, 1e15], "host": {"fixed_s": 1e-3, "per_sequence_s": 1e-5, "steps": 9}, "switch_s": 1e-4,
         "link": {"latency_s": 2e-3, "bytes_per_s": 1e9, "transfers": 4}}  # fmt: skip


def truth(p: Point) -> float:
    """A device whose steps cost what the profile's forms can say."""
    t = p.prompts * p.n
    prefill = 1e-7 * p.prompts * p.n * (p.n + p.r) + 2e-4 * t + 0.03 if t else 0.0
    decode = 1e-6 * p.bs * p.ctx + 1e-3 * p.bs + 0.035 if p.bs else 0.0
    return prefill + decode - (0.025 if t and p.bs else 0.0)


class FakeBench:
    """Measures by ``truth``; what is in ``broken`` fails."""

    def __init__(self, broken: int = 0) -> None:
        self.broken, self.asked = broken, []

    def measure(self, point: Point) -> Measured:
        self.asked.append(point)
        if self.broken and len(self.asked) % self.broken == 0:
            return Measured(point, failed="out of memory")
        return Measured(point, truth(point), truth(point), truth(point), 0.0, 3)


def filled(path, bench, budget_s=1e9, error=0.01):
    store = Store(path, {"model": "m"})
    for name, value in FACTS.items():
        if name not in store.notes:
            store.note(name, value)
    ticks = iter(range(10**9))
    campaign = Campaign(MODEL, TOKENIZER, SPACE, store, Limits(budget_s, error, least=20), bench=bench, warm=False,
                        clock=lambda: float(next(ticks)))  # fmt: skip
    return store, campaign.run()


def test_the_fit_gives_back_a_device_it_can_describe_and_stops_when_it_does(tmp_path):
    store, why = filled(tmp_path / "p.jsonl", FakeBench())
    assert "held-out error below" in why
    assert len(store.points) < 200
    found = assemble(store, MODEL, name="fake", model_name="m", kv_tokens=4096, max_prompt=512)
    assert found.profile.fit is not None
    assert max(found.profile.fit.prefill_mape, found.profile.fit.decode_mape, found.fused_mape) < 0.02
    head, rows = pack([found.profile])
    for point in SPACE.scatter("fused", 20, seed=99):
        # host time per sequence is part of a step's decode coefficient
        assert predict_s(head[0], rows[0, -1], point) == pytest.approx(truth(point) + 1e-5 * point.bs, rel=0.05)
    assert found.profile.step_overhead_s == 1e-3
    assert plot(found, store, tmp_path / "fit.png").stat().st_size > 10_000


def test_neighbours_slow_the_device_part_by_the_share_of_time_they_compute(tmp_path):
    store, _ = filled(tmp_path / "p.jsonl", FakeBench())
    store.note("neighbours_1", {"wall": 1.2, "cpu": 1.1})
    plain, loaded = (
        assemble(
            store, MODEL, name="x", model_name="m", kv_tokens=4096, max_prompt=512, neighbours=n, neighbour_load=0.5
        )
        for n in (0, 1)
    )  # fmt: skip
    assert loaded.profile.decode_s(0, 1) - 1e-3 == pytest.approx((plain.profile.decode_s(0, 1) - 1e-3) * 1.1, rel=1e-3)
    store.note("neighbours_1", {"wall": 2.0, "cpu": 1.1})  # somebody else was computing: the wall says nothing
    one, two = (
        assemble(store, MODEL, name="x", model_name="m", kv_tokens=4096, max_prompt=512, neighbours=n) for n in (1, 2)
    )
    assert (one.neighbour_slowdown, two.neighbour_slowdown) == (1.1, 1.0)  # nobody has looked beside two


def test_what_was_measured_beside_one_neighbour_says_nothing_beside_three(tmp_path, monkeypatch):
    asked = []

    def measured(model, tokenizer, instances, batches, *, eager):
        asked.append(instances)
        return {"wall": float(instances), "cpu": float(instances)}

    monkeypatch.setattr("engine.calibration.campaign.neighbour_time", measured)
    for instances in (2, 4, 4):
        store = Store(tmp_path / "p.jsonl", {"model": "m"})
        for name, value in FACTS.items():
            store.note(name, value)
        limits = Limits(budget_s=-1.0)
        Campaign(MODEL, TOKENIZER, SPACE, store, limits, instances=instances, bench=FakeBench(), warm=False).run()
    assert asked == [2, 4]
    assert store.notes["neighbours_3"]["wall"] == 4.0


def test_a_link_on_which_size_does_not_show_is_a_finding_like_others(tmp_path, monkeypatch):
    store = Store(tmp_path / "p.jsonl", {"model": "m"})
    for name, value in FACTS.items():
        if name != "link":
            store.note(name, value)
    store.note("link_failed", "TimeoutError: at the first start")
    monkeypatch.setattr("engine.calibration.live.relative_nnls", lambda rows, seconds: (1e-3, 0.0))
    Campaign(MODEL, TOKENIZER, SPACE, store, Limits(300.0), bench=FakeBench(), warm=False).run()
    again = Store(tmp_path / "p.jsonl", {"model": "m"})
    assert again.notes["link"]["bytes_per_s"] is None
    assert "KV copies of any size" in _notes(again, 1, 0.0)
    found = assemble(again, MODEL, name="x", model_name="m", kv_tokens=4096, max_prompt=512)
    assert found.facts()["kv_gb_per_s"] is None
    assert "Not measured" not in found.profile.provenance.notes


def test_a_kind_of_step_that_always_fails_leaves_the_others(tmp_path):
    class NoFused(FakeBench):
        def measure(self, point):
            return Measured(point, failed="refused") if point.kind == "fused" else super().measure(point)

    store, why = filled(tmp_path / "p.jsonl", NoFused(), budget_s=150)
    assert "budget" in why
    assert (store.of("fused"), bool(store.of("decode"))) == ([], True)
    assert assemble(store, MODEL, name="x", model_name="m", kv_tokens=4096, max_prompt=512).fused_mape == 0.0


def test_points_outlive_a_crash_a_failed_point_and_a_second_start(tmp_path):
    path, bench = tmp_path / "p.jsonl", FakeBench(broken=5)
    store, why = filled(path, bench, budget_s=60)
    assert "budget" in why
    assert len(store.failures()) >= len(bench.asked) // 5
    with path.open("a") as file:
        file.write('{"point": {"kind": "dec')  # the power goes
    again = FakeBench()
    resumed, _ = filled(path, again)
    assert resumed.points[: len(store.points)] == store.points
    assert not set(bench.asked) & set(again.asked)  # nothing is measured twice, what failed neither
    with pytest.raises(SlalomError, match="another model"):
        Store(path, {"model": "other"})


@pytest.mark.parametrize("end", [b'{"point": {"ki', b"\0" * 600, b"\xff\xfe\n", b'{"point": 3}\n', b"[1]\n", b"{}\n"])
def test_points_that_end_in_the_middle_go_on(tmp_path, end):
    path = tmp_path / "p.jsonl"
    store = Store(path, {"model": "m"})
    store.add(Measured(Point("decode", bs=1, ctx=16), 1.0))
    path.write_bytes(path.read_bytes() + end)
    again = Store(path, {"model": "m"})
    assert again.points == store.points
    again.add(Measured(Point("decode", bs=2, ctx=16), 2.0))
    again.note("switch_s", 1)
    third = Store(path, {"model": "m"})
    assert (third.points, third.notes) == (again.points, {"switch_s": 1})
    path.write_bytes(end)
    with pytest.raises(SlalomError, match="points") if end.endswith(b"\n") else nullcontext():
        assert Store(path, {"model": "m"}).points == []


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 1000))
def test_every_proposed_point_fits_the_space(kind, seed):
    for point in [*SPACE.scatter(kind, 40, seed), *SPACE.corners(kind)]:
        assert SPACE.fits(point)
        assert (point.kind == "decode") == (point.prompts == 0)
        assert point.bs <= SPACE.max_batch
        assert point.rows >= 1


def test_doubt_is_largest_where_the_device_misbehaves():
    """A cliff that the forms cannot describe draws the next points to itself."""

    def seconds(p):
        return truth(p) * (1.6 if p.bs >= 12 else 1.0)

    measured = [Measured(p, seconds(p)) for p in (*SPACE.corners("decode"), *SPACE.scatter("decode", 40))]
    candidates = SPACE.scatter("decode", 150, seed=5)
    error, expected = doubts(measured, candidates)
    high = np.array([p.bs >= 10 for p in candidates])
    assert error[high].mean() > 1.3 * error[~high].mean()
    assert (expected > 0).all()
    assert held_out_error(measured) > held_out_error([Measured(m.point, truth(m.point)) for m in measured])
    chosen = next_points(SPACE, "decode", measured, {m.point for m in measured}, 6, seed=3)
    assert len(set(chosen)) == 6


def test_the_wall_is_believed_only_on_a_quiet_machine():
    assert believed([1.0, 1.01, 3.0, 1.02], [1.0, 1.0, 1.0, 1.0]) == (1.01, False)
    assert believed([3.0, 2.0, 2.5, 1.02], [1.0, 1.0, 1.1, 1.0]) == (1.0, True)
    assert believed([3.0, 2.0, 2.5], None) == (2.5, False)


def test_a_real_step_is_measured_and_one_that_does_not_fit_fails_alone():
    bench = Bench(MODEL, kv_tokens=1024, repeats=2)
    done = bench.measure(Point("fused", n=20, r=30, prompts=1, bs=3, ctx=40))
    assert not done.failed
    assert done.seconds > 0
    assert bench.measure(Point("decode", bs=60, ctx=100)).failed.startswith("MemoryError")


@pytest.mark.slow
def test_the_command_calibrates_the_tiny_model_from_end_to_end(tmp_path):
    out = tmp_path / "tiny.json"
    arguments = ["--model", "dummy:tiny", "--device", "cpu", "--dtype", "float32", "--budget", "6s", "--out", str(out),
                 "--max-tokens", "64", "--max-batch", "4", "--max-context", "64", "--kv-tokens", "1024"]  # fmt: skip
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout[result.stdout.index("{") :])
    profile = Profile.load(out)
    notes = [json.loads(line) for line in (tmp_path / "tiny.points.jsonl").read_text().splitlines()]
    host = next(note["value"] for note in notes if note.get("note") == "host")
    assert host["fixed_s"] + host["per_sequence_s"] > 0  # which of the two, the least squares may tell differently
    assert profile.step_overhead_s == host["fixed_s"]
    assert profile.kv_tokens == 1024
    assert facts["points"]["decode"] >= 8
    assert (tmp_path / "tiny.png").exists()


def test_budget_is_written_with_a_unit():
    assert [parse_seconds(t) for t in ("90", "90s", "4m", "1h")] == [90.0, 90.0, 240.0, 3600.0]
    for bad in ("", "soon", "-4m", "0s"):
        with pytest.raises(SlalomError, match="budget"):
            parse_seconds(bad)


def test_a_part_of_the_device_is_a_row_of_its_own(tmp_path):
    store, _ = filled(tmp_path / "p.jsonl", FakeBench())
    store.note("device_total", 4)
    part = {"prefill": 3.0, "decode": 1.5, "corun_prefill": 1.2, "corun_decode": 1.1, "guard": 1.3}
    store.note("share_1", part)
    store.note("share_3_failed", "SlalomError: cannot be cut there")
    profile = assemble(store, MODEL, name="x", model_name="m", kv_tokens=4096, max_prompt=512).profile
    assert [s.sms for s in profile.shares] == [1, 4]
    assert profile.total_sms == 4
    assert profile.prefill_s(200, sms=1) == pytest.approx(3.0 * profile.prefill_s(200), rel=1e-6)
    assert (profile.shares[0].corun_decode, profile.shares[0].guard) == (1.1, 1.3)
    assert "share_3" in profile.provenance.notes


def test_busy_neighbours_are_met_on_a_running_engine():
    found = neighbour_time(MODEL, TOKENIZER, 2, batches=(1, 3), output=6)
    assert set(found) == {"wall", "cpu"}
    assert min(found.values()) > 0.2
    with pytest.raises(ValueError, match="ran both alone and beside"):
        neighbour_time(MODEL, TOKENIZER, 2, batches=(3,), output=1)  # a prompt alone gives the only token: no decode


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core cannot be shared out")
def test_lanes_of_a_cpu_are_measured_beside_each_other():
    found = measure_share(MODEL, make_device("cpu"), SPACE, 1)
    assert set(found) == {"prefill", "decode", "corun_prefill", "corun_decode", "guard"}
    assert found["guard"] >= found["corun_decode"] >= 1.0
    assert 0.2 < found["decode"] < 5.0


class Lanes:
    """A bench whose second lane refuses its steps."""

    def __init__(self):
        self.device = MODEL.embed.weight.device

    def spans(self, point):
        return point

    def step(self, spans, l, partition):
        if l == 1:
            raise MemoryError("no room")


def test_a_neighbour_that_failed_is_no_neighbour():
    prompt, decodes = Point("prefill", n=8, prompts=1), Point("decode", bs=1, ctx=8)
    bench = Lanes()
    assert _beside(_Place(bench, 0), prompt, _Place(bench, 0), decodes) > 0.0
    with pytest.raises(RuntimeError, match="beside it failed"):
        _beside(_Place(bench, 0), prompt, _Place(bench, 1), decodes)
