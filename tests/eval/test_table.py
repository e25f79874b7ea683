"""The table of policies and scenarios, and the static plan that stands in it as a baseline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import SlalomError
from env.measure.contender import PointSettings
from env.measure.digest import scenario_hash
from env.measure.evaluator import Evaluator
from env.scenario import Scenario
from eval.compare import table
from eval.compare.static import as_contender, place_to_beat, score_of, search_static, spread
from eval.placement.placement import arrangements
from eval.report.table_page import markdown, page, summary
from train.search.fitness import merged

CHAT = "azure-conv-4xa100"


def test_scenarios_are_named_with_commas_or_all_and_come_once() -> None:
    assert table.scenario_names(["all", CHAT]) == table.TRAFFIC
    assert table.scenario_names([f"{CHAT}, tiny-4xa100", CHAT]) == (CHAT, "tiny-4xa100")
    assert len({Scenario.load(name).regime for name in table.TRAFFIC}) == 8


def test_runs_are_long_against_the_time_a_request_may_take() -> None:
    writing = Scenario.load("creation-pd-4xa100")
    slow, fast = (table.steady_requests(writing, rate) for rate in (0.1, 13.0))
    assert slow == writing.n_requests
    assert fast / 13.0 > 200.0  # seconds; an answer of 1,000 tokens may take 30
    assert table.steady_requests(writing, 1e6) == table.MOST_REQUESTS


def test_a_hopeless_trial_stops_early_at_a_bound_that_cannot_win() -> None:
    asked: list[float] = []

    def level(rate: float) -> float:
        asked.append(rate)
        return {1.0: 0.3, 2.0: 0.2, 3.0: 0.1}[rate]

    rates = (2.0, 1.0, 3.0)
    assert score_of(level, rates) == pytest.approx(merged([0.3, 0.2, 0.1]))
    assert asked == [1.0, 2.0, 3.0]
    asked.clear()
    bound = score_of(level, rates, floor=0.5)
    assert asked == [1.0]
    assert merged([0.3, 0.2, 0.1]) <= bound < 0.5
    assert place_to_beat([0.1, 0.9, 0.5], 2) == 0.5
    assert place_to_beat([0.9], 2) == 0.0


def test_few_trials_still_look_at_every_family() -> None:
    listed = list(arrangements(Scenario.load("shift-pd-8xa100"), 8))
    families: dict[str, list[Any]] = {}
    for a in listed:
        families.setdefault(a.family, []).append(a)
    few = spread(list(families.values()), 6)
    assert len(few) == len({a.label for a in few}) <= 6
    assert {a.family for a in few} == set(families)
    assert len(spread(list(families.values()), 1000)) == len(listed)


def test_the_static_plan_keeps_to_its_budget_and_is_no_worse_than_what_it_looked_at() -> None:
    scenario = Scenario.load(CHAT)
    settings = PointSettings(n_requests=200)
    found = search_static(
        scenario, 10, knee=20.0, factors=(1.0, 1.3), settings=settings, seeds=(0,), valid_seeds=1, finalists=2
    )
    assert found.trials == 10
    assert found.contender.name == "static_plan"
    assert found.score == max(entry["final"] for entry in found.ranking)
    with Evaluator(scenario, settings) as evaluator:
        point = evaluator.points(found.contender, 20.0, [0])[0]
        mixed = as_contender(next(iter(arrangements(scenario, 4))))
        assert point.metrics["n_gpus"] == 4
        assert evaluator.points(mixed, 20.0, [0])[0].metrics["policy_sha256"] != point.metrics["policy_sha256"]


@pytest.fixture(scope="module")
def small() -> tuple[table.TableRequest, dict[str, Any], Path]:
    import tempfile

    folder = Path(tempfile.mkdtemp())
    slow = {"kind": "synthetic", "lengths": {"kind": "fixed", "prompt": 6000, "output": 2}}  # few events a second
    files = []
    for name, count in (("pair", 2), ("alone", 1)):
        facts = {"name": name, "cluster.0.count": count, "reference_rate": 1.0, "rates.low": 0.1}
        facts |= {"classes.0.ttft_s": 4.0, "workload": slow}
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(Scenario.load(CHAT).with_overrides(facts).to_yaml())
    policies = ("static_split", "static_plan", "least_tokens")
    request = table.TableRequest(tuple(map(str, files)), policies, requests=100, seeds=1, tune=2)
    return request, table.run_table(request, out=folder), folder


def test_every_cell_has_its_figures_or_a_reason(small: tuple[Any, dict[str, Any], Path]) -> None:
    cells = {(c["scenario"], c["policy"]): c for c in small[1]["cells"]}
    json.dumps(small[1], allow_nan=False)
    assert len(cells) == 6
    assert "two instances" in cells["alone", "static_split"]["refused"]
    split = cells["pair", "static_split"]
    assert split["tuned"]["search"]["trials"] == 2
    for kind in ("untuned", "tuned"):
        assert split[kind]["decisions_per_second"] > 0
        assert split[kind]["rate"] == 1.0
    assert cells["pair", "least_tokens"]["tuned"]["search"]["trials"] > 0  # no parameters, but levers
    assert cells["pair", "static_plan"]["tuned"]["search"]["trials"] == 2


def test_the_table_leads_with_what_is_held_for_good(small: tuple[Any, dict[str, Any], Path]) -> None:
    result = small[1]
    assert result["goodput_kind"] == "sustained"
    found = next(c for c in result["cells"] if (c["scenario"], c["policy"]) == ("pair", "least_tokens"))["untuned"]
    goodput = found["goodput"]
    assert goodput["low"] < goodput["rate"] < goodput["high"]
    assert goodput["verdict"]["met"]
    assert goodput["verdict"]["seconds"] > 1100.0
    assert 0.0 < goodput["rate"] <= found["classic"]
    text = markdown(result)
    plan = next(c for c in result["cells"] if c["policy"] == "static_plan")["tuned"]["goodput"]
    assert f"static_plan: {plan['above']['rate']:.3g} fails by {plan['fails_above']}" in text
    head, rows = summary(result)
    row = next(row for row in rows if row[0] == "least_tokens")
    assert f"({goodput['rate']:.3g}/{found['classic']:.3g})" in row[head.index("pair")]


def test_searches_are_bounded_and_defaults_left_out_where_that_is_asked(
    small: tuple[Any, dict[str, Any], Path],
) -> None:
    request = replace(small[0], scenarios=small[0].scenarios[:1], policies=("power_of_two",), tune=30)
    bounded = replace(request, tune_requests=1500.0, only_tuned=True)
    cell = table.run_table(bounded)["cells"][0]
    assert cell["untuned"] is None
    assert 0 < cell["tuned"]["search"]["trials"] < 30


def test_cells_of_another_way_of_measuring_are_not_read_back(
    small: tuple[Any, dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, folder = table._Task(small[0].scenarios[0], "least_tokens", small[0]), Path("folder")
    before = task.file(folder)
    for other in ({"only_tuned": True}, {"tune_requests": 1e6}):
        assert replace(task, request=replace(small[0], **other)).file(folder) != before
    monkeypatch.setattr(table, "_measuring", lambda: "another search of sustained goodput")
    assert task.file(folder) != before


def test_a_table_resumes_from_its_cells(
    small: tuple[Any, dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    request, first, folder = small
    monkeypatch.setattr(table, "run_cell", None)
    again = table.run_table(request, out=folder)
    assert json.dumps(again["cells"]) == json.dumps(first["cells"])  # a pair comes back as a list


def test_pages_show_every_policy_and_why_one_is_missing(small: tuple[Any, dict[str, Any], Path]) -> None:
    result = small[1]
    text, html = markdown(result), page(result)
    head, rows = summary(result)
    assert len(rows) == 3
    assert all(len(row) == len(head) for row in rows)
    for word in ("static_plan: ", "Left out: static_split", "P99 ITL", "100 requests per run"):
        assert word in text
        assert word in html


def test_a_changed_trace_file_changes_the_scenarios_digest(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("a\n")
    source = {"path": str(file), "format": "azure", "columns": {"arrival": "t"}}
    scenario = Scenario.load(CHAT).with_overrides({"workload": {"kind": "trace", "source": source}})
    before = scenario_hash(scenario)
    assert scenario_hash(scenario) == before
    file.write_text("a\nb\n")
    assert scenario_hash(scenario) != before


def test_a_named_policy_that_fits_nowhere_is_refused(tmp_path: Path) -> None:
    one = tmp_path / "one.yaml"
    one.write_text(Scenario.load(CHAT).with_overrides({"cluster.0.count": 1}).to_yaml())
    with pytest.raises(SlalomError, match="two instances"):
        table.run_table(table.TableRequest((str(one),), ("static_split",), requests=100, seeds=1))


@pytest.mark.parametrize(("policy", "says"), [("least_token", "mean least_tokens"), ("chunked:rooter=ttft", "router")])
def test_a_slip_in_a_policy_is_told_before_anything_is_simulated(
    policy: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_knee", None)
    with pytest.raises(SlalomError, match=says):
        table.run_table(table.TableRequest((CHAT,), ("least_tokens", policy)))
