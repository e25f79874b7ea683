"""Placement: arrangements within the budget, DistServe's algorithms against queueing theory, the command."""

from __future__ import annotations

import json
import math
import sys

import pytest
from scipy.optimize import brentq

from engine.errors import SlalomError
from engine.latency import Profile
from env.scenario import Scenario
from eval.placement import cli as placement_cli
from eval.placement.disaggregation import (
    algorithm_1,
    algorithm_2,
    choose_algorithm,
    phase_goodput,
    siblings,
    transfer_s,
)
from eval.placement.placement import Arrangement, Effort, arrangements, measure, plan, variants

OPT = "distserve-13b-3xa100"
FIXED = {"workload.lengths": {"kind": "fixed", "prompt": 512, "output": 64}}


def opt(**overrides: object) -> Scenario:
    return Scenario.load(OPT).with_overrides(FIXED | overrides)


def gpus_of(arrangement: Arrangement) -> int:
    return sum(g.count * Profile.load(str(g.profile)).tp for g in arrangement.groups)


def wait_within(rate: float, service: float, t: float) -> float:
    """P(wait ≤ t) of an M/D/1 queue (Crommelin 1932)."""
    terms = (
        (-rate * (t - k * service)) ** k / math.factorial(k) * math.exp(rate * (t - k * service))
        for k in range(int(t / service) + 1)
    )
    return (1.0 - rate * service) * sum(terms)


@pytest.mark.parametrize("tp", [1, 2])
def test_prefill_alone_is_an_m_d_1_queue(tp: int) -> None:
    """Prompts of one length, one at a time: the goodput is where 90 % wait no longer than target − service."""
    scenario, profile = opt(), Profile.load(f"opt-13b-a100-tp{tp}")
    service = profile.prefill_s(512) + profile.step_overhead_s
    exact = brentq(lambda rate: wait_within(rate, service, 0.25 - service) - 0.9, 1e-3, 0.999 / service)
    found = phase_goodput(scenario, profile, "prefill", prefill_tokens=1, n_requests=12_000, tolerance=0.005)
    assert found == pytest.approx(exact, rel=0.04)


def test_decode_alone_ends_where_the_batch_makes_the_step_as_long_as_the_target() -> None:
    """Little's law: bs = rate · gaps · step. Half of the requests are within the target where step(mean bs) is
    the target (prompts cost nothing)."""
    scenario, profile = opt(**{"classes.0.tpot_s": 0.04}), Profile.load("opt-13b-a100-tp1")
    context = 512 + 32
    batch = max(bs for bs in range(1, 90) if profile.decode_s(bs * context, bs) <= 0.04)
    found = phase_goodput(scenario, profile, "decode", goal=0.5, n_requests=4000, tolerance=0.01)
    assert found == pytest.approx(batch / (63 * 0.04), rel=0.06)


def test_a_phase_that_cannot_meet_its_target_has_no_goodput() -> None:
    impossible = opt(**{"classes.0.ttft_s": 0.01})
    assert phase_goodput(impossible, Profile.load("opt-13b-a100-tp1"), "prefill", n_requests=100) == 0.0
    with pytest.raises(SlalomError, match="prefill"):
        algorithm_1(impossible, 5.0, n_requests=100)


def test_algorithm_1_counts_instances_for_the_traffic() -> None:
    placed = algorithm_1(opt(), 40.0, n_requests=300, tolerance=0.1)
    assert (placed.n - 1) * placed.prefill_rate < 40.0 <= placed.n * placed.prefill_rate
    assert (placed.m - 1) * placed.decode_rate < 40.0 <= placed.m * placed.decode_rate
    tp = [Profile.load(name).tp for name in (placed.prefill, placed.decode)]
    assert placed.gpus == placed.n * tp[0] + placed.m * tp[1]


def test_algorithm_2_keeps_a_pair_within_a_node_and_replicates_it() -> None:
    placed = algorithm_2(opt(), 30.0, node_gpus=3, n_requests=300, tolerance=0.1)
    tp = [Profile.load(name).tp for name in (placed.prefill, placed.decode)]
    assert sum(tp) <= 3
    assert placed.n == placed.m == math.ceil(30.0 / placed.prefill_rate)
    with pytest.raises(SlalomError, match="node_gpus"):
        algorithm_2(opt(), 30.0, node_gpus=0)


def test_a_slow_link_asks_for_algorithm_2() -> None:
    fast, slow = opt(), opt(**{"links.bandwidth_gb_s": 3.0})
    profile = Profile.load("opt-13b-a100-tp1")
    assert transfer_s(slow, profile) == pytest.approx(512 * 819200 / 3e9)
    assert (choose_algorithm(fast), choose_algorithm(slow)) == (1, 2)


def test_siblings_share_the_model_device_and_engine_and_stay_out_of_relative_targets() -> None:
    assert [p.name for p in siblings(opt())] == [f"opt-13b-a100-tp{tp}" for tp in (1, 2, 4)]
    relative = opt(**{"classes.0.ttft_factor": 5.0})
    assert {p.name for p in siblings(relative)} == {"opt-13b-a100-tp1", "opt-13b-a100-tp2"}


@pytest.mark.parametrize(("name", "gpus"), [(OPT, 4), (OPT, 7), ("azure-code-mux-4xa100", 3)])
def test_arrangements_stay_in_the_budget_and_waste_no_instance(name: str, gpus: int) -> None:
    scenario = Scenario.load(name)
    listed = list(arrangements(scenario, gpus))
    least = min(p.tp for p in siblings(scenario))
    families = {a.family for a in listed}
    assert len({a.label for a in listed}) == len(listed)
    assert ("multiplexed" in families) == (name != OPT)
    assert {"mixed", "disaggregated", "hybrid"} <= families
    for a in listed:
        assert 0 < gpus_of(a) <= gpus
        last = Profile.load(str(a.groups[-1].profile)).tp
        assert gpus - gpus_of(a) < max(last, least)
        assert a.applied(scenario).n_gpus() == gpus_of(a)


def test_variants_change_budgets_only() -> None:
    scenario = Scenario.load("azure-code-mux-4xa100")
    profiles = {p.name: p for p in siblings(scenario)}
    for a in arrangements(scenario, 3):
        made = list(variants(a, profiles))
        assert len({v.label for v in made}) == len(made) >= 3
        for v in made:
            assert [(g.role, g.count, g.profile) for g in v.groups] == [(g.role, g.count, g.profile) for g in a.groups]
            v.applied(scenario)


def test_the_plan_names_the_best_of_its_families_and_why() -> None:
    scenario = opt()
    said: list[str] = []
    result = plan(scenario, gpus=2, n_requests=200, seeds=1, say=said.append)
    best = result["best"]
    for key in ("runner_up", "mixed_only", "disaggregated_only"):
        assert result[key]["goodput"] <= best["goodput"]
    assert best["label"] != result["runner_up"]["label"]
    assert result["mixed_only"]["family"] == "mixed"
    assert result["multiplexed_only"] is None
    assert "TTFT" in result["reason"]
    assert len(said) == 3
    json.dumps(result, allow_nan=False)


def test_two_replicas_behind_one_dispatcher_serve_at_least_twice_as_much() -> None:
    scenario, effort = opt(), Effort(1500, tolerance=0.02)
    one, two = (next(a for a in arrangements(scenario, n) if a.family == "mixed") for n in (1, 2))
    rates = [measure(scenario, a, 0.9, effort).rate for a in (one, two)]
    assert rates[1] > 1.95 * rates[0]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--scenario", "nowhere"], "scenario"),
        (["--scenario", OPT, "--goal", "1.5"], "goal"),
        (["--scenario", OPT, "--out", "."], "--out"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan-placement", *arguments])
    with pytest.raises(SystemExit) as stop:
        placement_cli.main()
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert word in captured.err


def test_json_is_all_of_standard_output_and_equals_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    file = tmp_path / "plan.json"
    base = ["plan-placement", "--scenario", OPT, "--gpus", "2", "--requests", "100", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", [*base, "--json", "--out", str(file)])
    with pytest.raises(SystemExit) as stop:
        placement_cli.main()
    captured = capsys.readouterr()
    assert not stop.value.code
    assert json.loads(captured.out) == json.loads(file.read_text())
    assert "arrangements" in captured.err
    monkeypatch.setattr(sys, "argv", [*base, "--json", "--out", str(file / "plan.json")])
    with pytest.raises(SystemExit) as stop:
        placement_cli.main()
    assert stop.value.code == 2
    assert json.loads(capsys.readouterr().out) == json.loads(captured.out)  # what was searched is not lost
