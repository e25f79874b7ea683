"""``eval-policy --env remote``: the same comparison, played on engines of others behind the router."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
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
