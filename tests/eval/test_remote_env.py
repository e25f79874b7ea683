"""``eval-policy --env remote``: the same comparison, played on engines of others behind the router."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from engine.core.kinds import RequestState
from engine.errors import SlalomError
from engine.remote.discover import EngineFacts, discover
from env.live.remote import replay
from env.scenario import Scenario
from env.surrogate.simulate import simulate
from eval.cli import Options, evaluate
from eval.fidelity.errors import Case
from eval.fidelity.promise import promise_of

ROOT = Path(__file__).resolve().parents[2]
SCENARIO = Scenario.load("smollm2-2xcpu")
RATE, N = 40.0, 40


@pytest.fixture(scope="module")
def engines() -> Iterator[list[EngineFacts]]:
    script, found, processes = str(ROOT / "eval" / "benchmarks" / "mock_engine.py"), [], []
    ports = (18_431, 18_432)
    try:
        for port in ports:
            processes.append(subprocess.Popen([sys.executable, script, str(port), "--token-s", "0.002"]))
        for port in ports:
            url = f"http://127.0.0.1:{port}"
            for _ in range(2000):
                try:
                    found.append(discover(url))
                    break
                except SlalomError:
                    time.sleep(0.01)
        yield found
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_every_request_of_the_scenario_is_played_with_its_length(engines: list[EngineFacts]) -> None:
    run = replay(SCENARIO, "least_tokens", rate=RATE, engines=engines, n_requests=N)
    same = simulate(SCENARIO, "least_tokens", rate=RATE, n_requests=N)
    assert (run.req["state"] == RequestState.FINISHED).all()
    assert run.req["prompt"].tolist() == same.req["prompt"].tolist()
    assert run.req["generated"].tolist() == same.req["output"].tolist()
    first, last = run.req["first_token"] - run.req["arrival"], run.req["last_token"] - run.req["first_token"]
    assert (first > 0).all()
    assert (last[run.req["generated"] > 1] > 0).all()
    assert np.isfinite(run.lag_s).all()
    seen = [httpx.get(f"{engine.url}/control", trust_env=False).json() for engine in engines]
    assert sum(engine["ended"] for engine in seen) == N
    assert all(engine["running"] == 0 for engine in seen)


def test_the_command_compares_policies_on_engines(
    engines: list[EngineFacts], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "two.yaml").write_text(SCENARIO.to_yaml(), encoding="utf-8")
    options = Options(
        scenario=[str(tmp_path / "two.yaml")], policy=["least_tokens", "round_robin"], env="remote", rates="40",
        engines=",".join(engine.url for engine in engines), seeds=1, requests=N, as_json=True,
    )  # fmt: skip
    evaluate(**vars(options))
    result = json.loads(capsys.readouterr().out)
    assert result["settings"]["backend"] == "remote"
    runs = [run for policy in result["policies"] for point in policy["points"] for run in point["runs"]]
    assert {run["backend"] for run in runs} == {"remote"}
    assert all(run["completed"] == run["num_prompts"] > 30 for run in runs)


def test_what_was_promised_stands_beside_what_arrived(
    engines: list[EngineFacts], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The address of a router of others (here an engine itself) is a row without a promise."""
    (tmp_path / "two.yaml").write_text(SCENARIO.to_yaml(), encoding="utf-8")
    options = Options(
        scenario=[str(tmp_path / "two.yaml")], policy=["round_robin", "least_tokens", engines[0].url], env="remote",
        engines=",".join(engine.url for engine in engines), fidelity=True, loads="0.5", repetitions=2, run_s=1.0,
        store=False, out=tmp_path / "runs", as_json=True,
    )  # fmt: skip
    before = [httpx.get(f"{engine.url}/control", trust_env=False).json()["ended"] for engine in engines]
    evaluate(**vars(options))
    result = json.loads(capsys.readouterr().out)
    after = [httpx.get(f"{engine.url}/control", trust_env=False).json()["ended"] for engine in engines]
    rows = result["promise"]["rows"]
    assert [row["policy"] for row in rows] == options.policy
    n = result["table"][0]["requests"]
    assert sum(after) - sum(before) == 6 * n
    assert after[0] - before[0] > after[1] - before[1]  # it had the router's requests alone
    assert [row["promised"] is None for row in rows] == [False, False, True]
    assert rows[0]["promised_gain"] == rows[0]["arrived_gain"] == 0.0
    for row in rows:
        assert 0.0 <= row["low"] <= row["arrived"] <= row["high"] <= 1.0
    assert [row["policy"] for row in result["table"]] == ["round_robin", "least_tokens"]
    evaluate(**vars(replace(options, resume=True, as_json=False)))
    assert "arrived gain" in capsys.readouterr().out


def test_the_share_of_promised_gains_that_arrived() -> None:
    cases = [Case("s", policy, 0.8, 2.0, 0.8, 20) for policy in ("a", "b", "c", "d")]
    promised = dict(zip(cases, (0.80, 0.90, 0.70, 0.81), strict=True))
    arrived = dict(zip(cases, (0.60, 0.68, 0.55, 0.90), strict=True))
    found = promise_of(
        cases,
        {case: {"attainment": share} for case, share in promised.items()},
        {case: [{"attainment": share + x} for x in (-0.1, 0.0, 0.05)] for case, share in arrived.items()},
    )
    # b and c: 20 points promised, 8 and 5 arrived; the promise of d is too small to count
    assert found["share_arrived"] == pytest.approx(0.13 / 0.20)
    assert found["rows"][3]["arrived_gain"] == pytest.approx(0.30)
    assert found["rows"][0]["low"] == pytest.approx(0.5)


def test_clusters_that_the_engines_are_not_are_refused(engines: list[EngineFacts]) -> None:
    with pytest.raises(SlalomError, match="--engines"):
        replay(SCENARIO, "least_tokens", rate=RATE, engines=engines[:1])
    small = [EngineFacts(engine.url, "m", max_batch=1) for engine in engines]
    with pytest.raises(SlalomError, match="max_batch"):
        replay(SCENARIO, "least_tokens", rate=RATE, engines=small)
    short = [EngineFacts(engine.url, "m", context=8) for engine in engines]
    with pytest.raises(SlalomError, match="max_context"):
        replay(SCENARIO, "least_tokens", rate=RATE, engines=short)
    for options in ({"env": "remote"}, {"engines": "http://a"}, {"env": "elsewhere"}):
        with pytest.raises(SlalomError, match=r"--en(v|gines)"):
            evaluate(**vars(Options(scenario=["smollm2-2xcpu"], policy=["least_tokens"], **options)))
