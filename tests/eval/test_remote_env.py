"""``eval-policy --env remote``: the same comparison, played on engines of others behind the router."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from engine.core.kinds import RequestState
from engine.errors import SlalomError
from engine.remote.discover import EngineFacts, discover
from engine.remote.router import Router
from env.live.client import prompt_of
from env.live.remote import replay
from env.scenario import Scenario
from env.surrogate.arena import build_trace
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


def test_a_scenario_of_vllm_is_played_with_prompts_and_answers_apart(engines: list[EngineFacts]) -> None:
    groups = [{"count": 1, "role": role, "max_batch": 16, "kv_tokens": 4096} for role in ("prefill", "decode")]
    scenario = SCENARIO.with_overrides({"engine": "vllm", "cluster": groups})
    before = [httpx.get(f"{engine.url}/control", trust_env=False).json()["pulled"] for engine in engines]
    run = replay(scenario, "static_split", rate=RATE, engines=engines, n_requests=N)
    after = [httpx.get(f"{engine.url}/control", trust_env=False).json()["pulled"] for engine in engines]
    assert (run.req["state"] == RequestState.FINISHED).all()
    assert [b - a for a, b in zip(before, after, strict=True)] == [0, N]
    with pytest.raises(SlalomError, match="routers"):
        replay(scenario.with_overrides({"routers": 2}), "static_split", rate=RATE, engines=engines, n_requests=N)
    with pytest.raises(SlalomError, match=r"cluster\.0\.role"):
        replay(scenario.with_overrides({"engine": "own"}), "static_split", rate=RATE, engines=engines)


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


def test_a_run_finds_nothing_of_another_in_prefix_caches(
    engines: list[EngineFacts], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, ...]] = []
    submit = Router.submit

    def spy(self: Router, path: str, body: dict[str, Any], **more: Any) -> Any:
        sent.append(tuple(body["prompt"]))
        return submit(self, path, body, **more)

    monkeypatch.setattr(Router, "submit", spy)
    for _ in range(2):
        replay(SCENARIO, "least_tokens", rate=RATE, engines=engines, n_requests=N)
    assert len({prompt[:16] for prompt in sent}) == 2 * N
    assert [len(prompt) for prompt in sorted(sent[:N], key=len)] == [len(p) for p in sorted(sent[N:], key=len)]


def test_prompts_of_one_run_share_what_the_trace_says_and_no_more() -> None:
    trace = build_trace(Scenario.load("rag-prefix-4xa100"), 5.0, 60, 0, "test")
    size = trace.hash_tokens

    def blocks(salt: int) -> list[list[tuple[int, ...]]]:
        prompts = [prompt_of(trace, row, 30_000, salt) for row in range(trace.n)]
        return [[tuple(p[i : i + size]) for i in range(0, len(p) - size + 1, size)] for p in prompts]

    ours, theirs = blocks(1), blocks(2)
    whole = [int(n) for n in trace.hash_n]
    hashes = [trace.hashes[trace.hash_start[r] : trace.hash_start[r] + whole[r]].tolist() for r in range(trace.n)]
    shared = {h for k, one in enumerate(hashes) for h in one if any(h in other for other in hashes[:k])}
    assert shared
    by_hash: dict[int, set[tuple[int, ...]]] = {}
    for listed, found in zip(hashes, ours, strict=True):
        for h, block in zip(listed, found, strict=False):
            by_hash.setdefault(h, set()).add(block)
    assert {len(found) for found in by_hash.values()} == {1}
    assert not {b for row in ours for b in row} & {b for row in theirs for b in row}


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
