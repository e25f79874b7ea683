"""The controller: who gets one, that its search repeats itself, and that it becomes a checkpoint that acts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import train.cli as cli
from engine.core.kinds import Role
from engine.errors import SlalomError
from env.measure.phases import play_days
from env.scenario import Scenario
from policies import registry
from policies.checkpoint.folder import load
from train.budget import Budget
from train.control.days import drifts, practice, tune_on_days
from train.control.space import Axis, Space
from train.run import Request, run
from train.search.journal import Journal


@pytest.fixture(scope="module")
def small() -> Scenario:
    """Three instances, half-hour days of four phases, two roles."""
    changes = {
        "cluster.0.count": 1, "cluster.1.count": 2, "reference_rate": 2.0, "workload.duration_s": 1800.0,
        "decisions.roles": ["prefill", "decode"],
    }  # fmt: skip
    return Scenario.load("daynight-70b-30min").with_overrides(changes)


def test_a_controller_is_for_drifts_of_hours() -> None:
    day = Scenario.load("daynight-70b")
    assert [drifts(Scenario.load(n)) for n in ("daynight-70b", "surprise-70b", "shift-pd-8xa100")] == [
        True,
        True,
        False,
    ]
    assert not drifts(day.with_overrides({"decisions": {}}))
    for scenario in ("shift-pd-8xa100", "azure-conv-4xa100"):
        with pytest.raises(SlalomError, match="half an hour or more"):
            tune_on_days("planner", Scenario.load(scenario), requests=1)
    assert practice(day).workload.natural_s == 7200.0
    short = Scenario.load("daynight-70b-30min")
    assert practice(short) is short


def test_defaults_of_the_command_see_the_drift() -> None:
    for scenario, rule, expected in (
        ("daynight-70b", "auto", ("controller", "15m")),
        ("daynight-70b", "arrow", ("search", "2m")),
        ("azure-conv-4xa100", "auto", ("direct", "2m")),
    ):
        decided = cli._decided(cli.Options(scenario=scenario, rule=rule))
        assert (decided.algo, decided.budget) == expected
    kept = cli.Options(scenario="daynight-70b", algo="direct", budget="1h")
    assert cli._decided(kept) == kept
    with pytest.raises(SlalomError, match="leave it out"):
        cli._learned(cli.Options(scenario="daynight-70b", algo="controller", rule="arrow"))


def test_axes_go_there_and_back() -> None:
    for param in registry.get("planner").params:
        if param.choices is None:
            axis = Axis(param)
            assert axis.value(0.0) == param.low
            assert axis.value(1.0) == param.high
            assert axis.value(axis.place(param.default)) == pytest.approx(param.default)


def test_everybody_may_arrange_queues_and_who_changes_no_roles_whole_fleets() -> None:
    day = Scenario.load("daynight-70b-30min")
    own, free = Space("planner", day, arranges=True), Space("muxwise", day, arranges=False)
    moving = [c for c in own.choices() if c["by"] != "nothing"]
    stays = [c for c in own.choices() if c["by"] == "nothing"]
    assert len(moving) == 18
    assert own.compositions() == []
    best = next(
        own.bind(own.defaults | c).arrangement for c in stays if c["side"] == "multiplexed" and c["start"] == 0.5
    )
    assert best is not None
    assert [plan.role for plan in best] == [Role.PREFILL] * 3 + [Role.MULTIPLEXED] * 3
    assert not any(axis.param.name.startswith("lever.") for axis in own.axes)
    assert {c["lever.order"] for c in free.choices()} == {"own", "fcfs", "shortest", "on_time"}
    mixture = next(c for c in free.compositions() if c["lever.roles"] == "2 prefill + 4 multiplexed")
    plans = free.bind(free.defaults | mixture).arrangement
    assert plans is not None
    assert [plan.role for plan in plans] == [Role.PREFILL] * 2 + [Role.MULTIPLEXED] * 4
    shorter = free.bind(free.defaults | mixture | {"lever.prefill_tokens": 0.5}).arrangement
    assert shorter is not None
    assert shorter[0].prefill_tokens * 2 == plans[0].prefill_tokens


def test_the_search_goes_on_where_it_was_stopped_and_leaves_out_what_is_not_allowed(
    small: Scenario, tmp_path: Path
) -> None:
    whole = tune_on_days("planner", small, requests=60_000, seed=1, journal=Journal(tmp_path / "whole", "same"))
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    (tmp_path / "half").write_bytes(b"".join(lines[: len(lines) // 2]))
    resumed = tune_on_days("planner", small, requests=60_000, seed=1, journal=Journal(tmp_path / "half", "same"))
    assert replace(whole, seconds=0.0) == replace(resumed, seconds=0.0)
    assert [line.split(b",")[:-1] for line in (tmp_path / "half").read_bytes().splitlines()] == [
        line.rstrip(b"\n").split(b",")[:-1] for line in lines
    ]
    assert whole.values["side"] == "decode"
    assert whole.knee > 1.3


def test_it_becomes_a_checkpoint_that_changes_roles(small: Scenario, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(small.to_yaml())
    summary = run(Request(str(path), "controller", "auto", Budget(frames=40_000), out=tmp_path / "run"))
    loaded = load(tmp_path / "run" / "best")
    assert (loaded.manifest.kind, loaded.manifest.rule.name) == ("rule", "planner")
    assert summary["base"]["sampler"] == "controller"
    day, phases = play_days(small, str(loaded.folder), 1.5, 0, "test")
    assert day.cluster["n_switches"] >= 3
    assert len(phases) == 4


def test_a_search_that_had_come_to_its_end_is_not_repeated(
    small: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "small.yaml", []
    path.write_text(small.to_yaml())
    asked = Request(str(path), "controller", "auto", Budget(frames=10_000), out=tmp_path / "run")

    def killed(*given: object) -> None:
        calls.append(given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("train.run.publish_controller", killed)  # between the end of the search and the checkpoint
        with pytest.raises(KeyboardInterrupt):
            run(asked)
    monkeypatch.setattr("train.run.tune_controller", killed)
    summary = run(replace(asked, resume=True))
    assert len(calls) == 1
    assert summary["base"] == run(replace(asked, resume=True))["base"]
    assert load(tmp_path / "run" / "best").manifest.rule.name == "planner"
    assert not (tmp_path / "run" / "search.jsonl").exists()


def test_a_composition_may_stay(small: Scenario) -> None:
    space = Space("planner", small, arranges=True)
    switches = []
    for by in ("needs", "nothing"):
        policy = space.bind(space.defaults | {"side": "decode", "order": "on_time", "by": by})
        switches.append(play_days(small, policy, 1.5, 0, "test")[0].cluster["n_switches"])
    assert switches[0] >= 3
    assert switches[1] == 0


def test_any_rule_gets_the_same_search(small: Scenario) -> None:
    arrow = tune_on_days("arrow", small, requests=40_000)
    assert arrow.rule == "arrow"
    assert (arrow.values, arrow.plans) != (registry.get("arrow").values(), None)  # its own parameters, or levers
    with pytest.raises(SlalomError, match="muxwise needs others"):
        tune_on_days("muxwise", small, requests=10_000)
