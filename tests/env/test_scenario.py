"""Scenario files: what is bundled is sound, what is wrong is named, what is dumped loads again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import SlalomError
from env.scenario import Regime, Scenario, list_scenarios, scenarios_dir

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = "azure-conv-4xa100"


def content(**changes: Any) -> dict[str, Any]:
    """The default scenario as parsed YAML with some sections replaced."""
    data: dict[str, Any] = yaml.safe_load((scenarios_dir() / f"{DEFAULT}.yaml").read_text())
    return data | changes


@pytest.mark.parametrize("name", list_scenarios())
def test_bundled_scenarios_load_draw_and_round_trip(name: str, tmp_path: Path) -> None:
    scenario = Scenario.load(name)
    assert scenario.name == name
    path = tmp_path / "copy.yaml"
    path.write_text(scenario.to_yaml())
    copy = Scenario.load(path)
    assert copy == scenario
    assert copy.hash() == scenario.hash()
    trace = scenario.workload.build(scenario.reference_rate, 200, 0, "train")
    assert trace.n > 0
    smallest = min(group.kv_tokens or 10**9 for group in scenario.cluster)
    capacity = min(smallest, *(profile.kv_tokens for profile in scenario.load_profiles()))
    assert (trace.prompt + trace.output).max() <= capacity, "a request could never fit"


def test_every_regime_is_bundled() -> None:
    bundled = [Scenario.load(name) for name in list_scenarios()]
    assert {scenario.regime for scenario in bundled} == set(get_args(Regime))
    assert len({name for scenario in bundled for name in scenario.profile_names()}) >= 4
    assert {group.role for scenario in bundled for group in scenario.cluster} == {
        "prefill",
        "decode",
        "mixed",
        "multiplexed",
    }


def test_the_default_is_four_mixed_a100() -> None:
    scenario = Scenario.load(DEFAULT)
    assert scenario.n_gpus() == 4
    assert [p.group.role for p in scenario.placements()] == ["mixed"] * 4
    assert scenario.profile_names() == ("llama-8b-a100",)
    assert scenario.regime == "balanced"


def test_gpus_and_pools_follow_tensor_parallelism_and_sharing() -> None:
    cluster = [
        {"count": 2, "role": "prefill", "profile": "opt-13b-a100-tp2"},
        {"count": 2, "role": "mixed", "share_gpu": True, "profile": "opt-13b-a100-tp1"},
        {"count": 1, "role": "decode", "profile": "opt-13b-a100-tp2"},
    ]
    scenario = Scenario.parse(content(cluster=cluster))
    assert [p.gpu for p in scenario.placements()] == [0, 2, 4, 4, 5]
    assert [p.pool for p in scenario.placements()] == [0, 1, 2, 2, 3]
    assert [p.profile for p in scenario.placements()] == [0, 0, 1, 1, 0]
    assert scenario.n_gpus() == 7


def group(**changes: Any) -> list[dict[str, Any]]:
    return [{"count": 4, "role": "mixed"} | changes]


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"colour": 1}, "colour"),
        ({"cluster": []}, "cluster"),
        ({"cluster": group(cout=1)}, "cluster.0.cout"),
        ({"cluster": group(count=0)}, "cluster.0.count"),
        ({"cluster": group(count="4")}, "cluster.0.count"),
        ({"cluster": group(count=True)}, "cluster.0.count"),
        ({"cluster": group(role="both")}, "cluster.0.role"),
        ({"cluster": group(batching="layered")}, "cluster.0.batching"),
        ({"cluster": group(split=16)}, "cluster.0.split"),
        ({"cluster": group(role="multiplexed", split=17)}, "sms"),
        ({"cluster": group(gpus_per_instance=2)}, "cluster.0.gpus_per_instance"),
        ({"cluster": group(role="multiplexed", profile="opt-13b-a100-tp1")}, "cluster.0.role"),
        ({"cluster": group(role="prefill")}, "mine.yaml"),
        ({"profile": "no-such-profile"}, "profile"),
        ({"links": {"bandwidth_gb_s": -1}}, "links.bandwidth_gb_s"),
        ({"links": {"bandwidth_gb_s": float("nan")}}, "links.bandwidth_gb_s"),
        ({"workload": {"kind": "magic"}}, "workload"),
        ({"classes": []}, "classes"),
        ({"classes": [{"name": "a", "share": 0.5, "ttft_s": 1.0, "tpot_s": 0.1}]}, "classes"),
        ({"classes": [{"name": "a", "tpot_s": 0.1}]}, "classes.0"),
        ({"classes": [{"name": "a", "ttft_s": 1.0, "tpot_s": 0}]}, "classes.0.tpot_s"),
        ({"decisions": {"place_prefill": False}}, "decisions.place_prefill"),
        ({"decisions": {"reallocate": True}}, "decisions"),
        ({"decisions": {"roles": ["prefill", "decode"]}}, "decisions"),
        ({"rates": {"low": 5.0, "high": 1.0}}, "rates.high"),
        ({"reference_rate": 1000.0}, "reference_rate"),
        ({"latency_jitter": 2.0}, "latency_jitter"),
        ({"latency_jitter": "some"}, "latency_jitter"),
        ({"n_requests": 0}, "n_requests"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(SlalomError) as caught:
        Scenario.parse(content(**changes), "mine.yaml")
    assert where in caught.value.field
    assert caught.value.fix


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "name: x\nname: y\n", "!!python/object:os.system x"])
def test_files_that_are_no_scenario_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SlalomError, match=r"mine\.yaml"):
        Scenario.load(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"latency_jitter": 5.0}, "latency_jitter: got 5.0; it must be 'profile', or it must be less than or equal"),
        ({"cluster.0.count": "four"}, "got 'four'; it must be a whole number"),
        ({"profile": "llama-8b-a10"}, "mistaken: profile: got 'llama-8b-a10'; did you mean llama-8b-a100?"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_with_what_may_stand_there(changes: dict[str, Any], says: str) -> None:
    content = Scenario.load(DEFAULT).with_overrides({"name": "mistaken"})
    with pytest.raises(SlalomError) as caught:
        content.with_overrides(changes)
    assert says in str(caught.value)


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("")
    with pytest.raises(SlalomError, match="the file is empty"):
        Scenario.load(tmp_path / "mine.yaml")


def test_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(SlalomError, match=DEFAULT):
        Scenario.load("no-such-scenario")


def test_infinite_bandwidth_is_free_and_survives_a_dump(tmp_path: Path) -> None:
    scenario = Scenario.parse(content(links={"bandwidth_gb_s": float("inf")}))
    assert scenario.links.bandwidth_gb_s == 0.0
    assert Scenario.parse(yaml.safe_load(scenario.to_yaml())) == scenario


def test_overrides_reach_deep_and_are_validated() -> None:
    scenario = Scenario.load(DEFAULT)
    changed = scenario.with_overrides({"cluster.0.count": 8, "rates.high": 80.0, "classes.0.tpot_s": 0.03})
    assert changed.n_gpus() == 8
    assert changed.classes[0].tpot_s == 0.03
    assert scenario.n_gpus() == 4
    assert changed.hash() != scenario.hash()
    for path, value in (("cluster.9.count", 1), ("cluster.0.cout", 1), ("rates.low", -1.0), ("a.b.c", 1)):
        with pytest.raises(SlalomError):
            scenario.with_overrides({path: value})


@settings(deadline=None, max_examples=30)
@given(st.permutations(sorted(content())))
def test_the_hash_ignores_the_order_of_keys_and_the_description(order: list[str]) -> None:
    data = content(description="other words")
    assert Scenario.parse({key: data[key] for key in order}).hash() == Scenario.load(DEFAULT).hash()


def test_the_hash_is_the_same_in_another_process() -> None:
    code = f"from env.scenario import Scenario; print(Scenario.load({DEFAULT!r}).hash())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == Scenario.load(DEFAULT).hash()
