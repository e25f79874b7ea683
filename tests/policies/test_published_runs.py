"""Published rules on whole runs of bundled scenarios: nobody is lost, and the claims that order them hold."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from engine.core.kinds import RequestState
from env.scenario import Scenario
from env.surrogate.simulate import RunResult, simulate

PUBLISHED = (
    "aibrix_pd",
    "arrow",
    "distserve",
    "dopd",
    "dopd_code",
    "dyn_load",
    "dyn_sla",
    "dynamo_kv",
    "llmd_latency",
    "llmd_token_load",
    "lodestar",
    "mooncake",
    "sglang_cache_aware",
    "splitwise",
    "taichi",
    "tropical",
    "tropical_code",
)
_ENDED = (RequestState.FINISHED, RequestState.SHED, RequestState.FAILED)


@cache
def run(scenario: str, policy: str, load: float = 1.0, n: int = 800) -> RunResult:
    loaded = Scenario.load(scenario)
    return simulate(loaded, policy, rate=load * loaded.reference_rate, n_requests=n)


def attainment(result: RunResult) -> float:
    good = (result.req["ttft_ok"] == 1) & (result.req["tpot_ok"] == 1)
    return float(np.mean(good & (result.req["state"] == RequestState.FINISHED)))


@pytest.mark.parametrize("scenario", ["mooncake-pd-8xh100", "classes-6xa100"])
@pytest.mark.parametrize("policy", PUBLISHED)
def test_every_request_ends_and_a_light_load_is_served_well(scenario: str, policy: str) -> None:
    result = run(scenario, policy, load=0.5, n=400)
    assert np.isin(result.req["state"], _ENDED).all()
    assert result.req["state"].tolist().count(RequestState.FAILED) == 0
    floor = 0.5 if policy == "dopd_code" else 0.8
    assert attainment(result) > floor


def test_slack_routing_beats_a_static_split_on_long_prompts() -> None:
    """The claim of Tropical: disaggregation queues long prompts while its decode instances have slack."""
    static, slack = run("mooncake-pd-8xh100", "distserve", 1.3), run("mooncake-pd-8xh100", "tropical", 1.3)
    assert attainment(slack) > attainment(static) + 0.05


def test_the_released_planner_starves_prefill_and_the_repaired_one_does_not() -> None:
    """N_P is not multiplied by N_D in the released code, so it asks for one where five are busy."""
    released, repaired = run("mooncake-pd-8xh100", "dopd_code"), run("mooncake-pd-8xh100", "dopd")
    assert attainment(repaired) > attainment(released) + 0.1


def test_tropical_is_what_distserve_is_not_at_the_same_split() -> None:
    """Same arrangement, and still some prompts were prefilled on decode instances."""
    static, slack = run("mooncake-pd-8xh100", "distserve", 1.3), run("mooncake-pd-8xh100", "tropical", 1.3)
    decode = slack.inst["role"] == 1
    np.testing.assert_array_equal(static.inst["role"], slack.inst["role"])
    assert not np.isin(static.req["first_inst"], np.flatnonzero(decode)).any()
    assert np.isin(slack.req["first_inst"], np.flatnonzero(decode)).mean() > 0.05
