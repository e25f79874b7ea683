"""Figures that mean what they say: metrics, state, dashboard and log against what clients saw."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_server import GREEDY, PROMPT, Served
from waiting import until

from engine.core.kinds import RequestState
from engine.live.fate import ABORT, SHED, fate_of
from engine.model import SamplingParams
from policies.serve import Options

CLASSES = """
classes:
  - {name: chat, ttft_s: 100, tpot_s: 50}
  - {name: hurry, ttft_s: 0.000001, tpot_s: 0.000001}
  - {name: idle, ttft_s: 1, tpot_s: 1}
"""
LONG: dict[str, Any] = {"prompt": PROMPT, **GREEDY, "max_tokens": 4000, "stream": True}


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path / "decisions.jsonl"


@pytest.fixture
def served(tmp_path: Path, log_path: Path) -> Iterator[Served]:
    (tmp_path / "classes.yaml").write_text(CLASSES)
    server = Served(instances=2, classes=str(tmp_path / "classes.yaml"), max_requests=2, decision_log=str(log_path))
    yield server
    server.close()


def figures(server: Served) -> dict[str, dict[tuple[str, ...], float]]:
    """Samples by name and by the values of their labels, those of model and engine left out."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(server.client.get("/metrics").text):
        for sample in family.samples:
            labels = tuple(v for k, v in sample.labels.items() if k not in ("model_name", "engine"))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def open_stream(stack: ExitStack, server: Served, **more: Any) -> Iterator[str]:
    """A stream after its first token; it hangs up when the stack is left."""
    response = stack.enter_context(server.client.stream("POST", "/v1/completions", json=LONG, **more))
    lines = response.iter_lines()
    next(lines)
    return lines


def test_what_happened_to_open_requests_is_counted_before_they_end(served: Served) -> None:
    with ExitStack() as stack:
        kept = open_stream(stack, served)  # noqa: F841  (the client hangs up when it goes)
        found = figures(served)
        n_prompt = found["vllm:prompt_tokens_total"][()]
        assert n_prompt > 0
        assert found["vllm:time_to_first_token_seconds_count"][()] == 1
        assert found["vllm:request_prompt_tokens_sum"][()] == n_prompt
        assert found["vllm:prefix_cache_queries_total"][()] == n_prompt
        assert found["vllm:prefix_cache_hits_total"][()] <= n_prompt
        assert found["vllm:e2e_request_latency_seconds_count"][()] == 0
    until(lambda: figures(served)["vllm:request_success_total"][("abort",)] == 1)
    found = figures(served)
    assert found["vllm:prompt_tokens_total"][()] == n_prompt
    assert found["vllm:request_generation_tokens_sum"][()] == found["vllm:generation_tokens_total"][()] > 0
    assert found["vllm:e2e_request_latency_seconds_count"][()] == 0


def test_who_is_refused_is_seen_everywhere(served: Served, log_path: Path) -> None:
    served.post("/v1/completions", {"prompt": PROMPT, **GREEDY})
    with ExitStack() as stack:
        kept = [open_stream(stack, served) for _ in range(2)]  # noqa: F841
        for _ in range(3):
            assert served.post("/v1/completions", {"prompt": PROMPT, **GREEDY}).status_code == 429
        until(lambda: figures(served)["slalom:requests_refused_total"][("chat", "overloaded")] == 3)
        found = figures(served)
        assert found["slalom:slo_attainment_ratio"][("chat", "both")] == pytest.approx(1 / 4)
        state = served.client.get("/dashboard/state").json()
        assert [c["refused"] for c in state["classes"]] == [3, 0, 0]
        assert state["classes"][0]["both"] == pytest.approx(1 / 4)
        assert served.post("/admin/drain", {}).json()["accepting"] is False
        assert served.post("/v1/completions", {"prompt": PROMPT, **GREEDY}).status_code == 503
        until(lambda: figures(served)["slalom:requests_refused_total"][("chat", "draining")] == 1)
        found = figures(served)
        assert found["slalom:accepting_requests"][()] == 0
        assert found["slalom:slo_attainment_ratio"][("chat", "both")] == pytest.approx(1 / 4), "an operator's doing"
    served.post("/admin/undrain", {})
    assert figures(served)["slalom:accepting_requests"][()] == 1

    def outcomes() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in log_path.read_text().splitlines()]
        return [line for line in lines if line["type"] == "outcome"]

    until(lambda: len(outcomes()) == 7)
    ends = [(line["finish"], line["good"]) for line in outcomes()]
    assert ends.count(("overloaded", False)) == 3
    assert ends.count(("draining", None)) == 1
    assert ends.count(("done", True)) == 1
    assert ends.count(("abort", None)) == 2
    assert {line["class"] for line in outcomes()} == {"chat"}


def test_who_leaves_after_its_target_is_a_miss_and_classes_have_names(served: Served) -> None:
    with ExitStack() as stack:
        kept = open_stream(stack, served, headers={"x-slo-class": "hurry"})  # noqa: F841
        assert not {"slalom:slo_attainment_ratio", "slalom:drift_ratio"} & set(figures(served)), "nothing ended"
    until(lambda: served.engine.n_open == 0)
    shares = figures(served)["slalom:slo_attainment_ratio"]
    assert {metric: shares[("hurry", metric)] for metric in ("both", "ttft", "tpot")} == {
        "both": 0,
        "ttft": 0,
        "tpot": 0,
    }
    assert {c for c, _ in shares} == {"hurry"}
    state = served.client.get("/dashboard/state").json()
    assert [c["class"] for c in state["classes"]] == ["chat", "hurry", "idle"]
    assert [c["both"] for c in state["classes"]] == [None, 0.0, None]


def test_a_lost_and_a_draining_instance_are_seen(served: Served) -> None:
    engine = served.engine
    with ExitStack() as stack:
        kept = [open_stream(stack, served) for _ in range(2)]  # noqa: F841
        assert engine.call(lambda: engine.state.inst["run_n"].tolist()) == [1, 1]
        served.post("/admin/role", {"instance": 1, "role": "prefill"})
        seen = {served.client.get("/admin/state").json()["instances"][1]["state"]}
        found = figures(served)["slalom:instance_state"]
        seen.add(next(name for (i, name), on in found.items() if i == "1" and on))
        assert seen == {"draining"}
    until(lambda: engine.n_open == 0)
    engine.call(lambda: engine.instances.lose(1, RuntimeError("made up")))
    assert [x["state"] for x in served.client.get("/admin/state").json()["instances"]] == ["serving", "lost"]
    assert [x["state"] for x in served.client.get("/dashboard/state").json()["instances"]] == ["serving", "lost"]
    found = figures(served)
    assert found["slalom:instance_state"][("1", "lost")] == 1
    assert sum(on for (i, _), on in found["slalom:instance_state"].items() if i == "1") == 1
    assert not any(on for (i, _), on in found["slalom:instance_role"].items() if i == "1")


def test_ids_are_unique_across_servers(served: Served) -> None:
    from engine.live.fate import SERVER

    first, second = (served.post("/v1/completions", {"prompt": PROMPT, **GREEDY}).json()["id"] for _ in range(2))
    assert first.startswith(f"cmpl-{SERVER}-")
    assert int(second.rpartition("-")[2]) == int(first.rpartition("-")[2]) + 1


def test_metrics_agree_with_what_a_client_measures(tmp_path: Path) -> None:
    """Thirty streams, some of them left early: counts to the token."""
    server = Served(instances=2, max_requests=64)
    try:
        server.post("/v1/completions", {"prompt": PROMPT, **GREEDY})
        before = figures(server)
        asyncio.run(_thirty(server, seen := {"tokens": 0, "whole": 0, "left": 0}))
        until(lambda: server.engine.n_open == 0)
        found = figures(server)

        def grown(name: str, labels: tuple[str, ...] = ()) -> float:
            return found[name][labels] - before[name][labels]

        ends = "vllm:request_success_total"
        assert grown(ends, ("length",)) == seen["whole"] == 24
        assert grown(ends, ("abort",)) == seen["left"] == 6
        assert grown("vllm:time_to_first_token_seconds_count") == 30
        assert grown("vllm:e2e_request_latency_seconds_count") == 24
        assert grown("vllm:prompt_tokens_total") == 30 * before["vllm:prompt_tokens_total"][()]
        generated = grown("vllm:generation_tokens_total")
        assert generated == grown("vllm:request_generation_tokens_sum")
        assert grown("vllm:inter_token_latency_seconds_count") == generated - 30
        assert 24 * 40 + 6 <= seen["tokens"] <= generated <= 24 * 40 + 6 * 40
    finally:
        server.close()


async def _thirty(server: Served, seen: dict[str, int]) -> None:
    async def one(k: int) -> None:
        body = {"prompt": PROMPT, **GREEDY, "max_tokens": 40, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                seen["tokens"] += line.startswith("data: {")
                if k % 5 == 0 and line.startswith("data: {"):
                    break
        seen["left" if k % 5 == 0 else "whole"] += 1

    async with httpx.AsyncClient(base_url=server.url, timeout=60.0, trust_env=False) as client:
        await asyncio.gather(*(one(k) for k in range(30)))


def test_latencies_agree_with_a_client_s_own_clock_within_a_hundredth() -> None:
    """The client sits in this process, so that what lies between the two clocks is microseconds; sums of forty."""
    server = Served(prefix_cache=False, max_batch=8)
    try:
        before, clock = figures(server), time.perf_counter
        seen: list[tuple[float, list[float]]] = []
        ended = []

        def client() -> Callable[[Any], None]:
            begin, stamps = clock(), list[float]()
            seen.append((begin, stamps))

            def sink(delta: Any) -> None:
                stamps.append(clock())
                if delta.finish is not None:
                    ended.append(delta.finish)

            return sink

        params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
        for k in range(40):
            server.engine.submit([k] * 500, params, client())
        until(lambda: len(ended) == 40, 120.0)
        found = figures(server)
        for name, theirs in (
            ("time_to_first_token", [stamps[0] - begin for begin, stamps in seen]),
            ("e2e_request_latency", [stamps[-1] - begin for begin, stamps in seen]),
            ("request_decode_time", [stamps[-1] - stamps[0] for _, stamps in seen]),
            ("request_time_per_output_token", [(stamps[-1] - stamps[0]) / 59 for _, stamps in seen]),
            ("inter_token_latency", [stamps[-1] - stamps[0] for _, stamps in seen]),
        ):
            ours = found[f"vllm:{name}_seconds_sum"][()] - before[f"vllm:{name}_seconds_sum"][()]
            assert ours == pytest.approx(sum(theirs), rel=0.01), name
    finally:
        server.close()


@pytest.mark.parametrize(
    ("record", "finish", "fate"),
    [
        ({"state": RequestState.FINISHED, "ttft_ok": 1, "tpot_ok": 1}, "", (True, True, True)),
        ({"state": RequestState.FINISHED, "ttft_ok": 0, "tpot_ok": 1}, "", (False, True, False)),
        ({"state": RequestState.SHED}, SHED, (False, False, False)),
        ({"first_token": -1, "finished": 5}, ABORT, (False, False, None)),
        ({"first_token": -1, "finished": 11}, ABORT, (False, False, False)),
        ({"first_token": 9, "last_token": 9, "generated": 1, "ttft_ok": 1}, ABORT, (True, True, None)),
        ({"first_token": 9, "last_token": 15, "generated": 4, "ttft_ok": 1}, ABORT, (True, True, None)),
        ({"first_token": 9, "last_token": 16, "generated": 4, "ttft_ok": 1}, ABORT, (True, False, False)),
        ({"first_token": 12, "last_token": 13, "generated": 4, "ttft_ok": 0}, ABORT, (False, True, False)),
    ],
)
def test_fates(record: dict[str, Any], finish: str, fate: tuple[bool, bool, bool | None]) -> None:
    """Targets are 10 ticks to the first token and 2 for each other."""
    from engine.core.state import REQUEST

    row = np.zeros(1, REQUEST)[0]
    row["state"], row["ttft_ok"], row["tpot_ok"] = RequestState.FAILED, -1, -1
    row["ttft_slo"], row["tpot_slo"] = 10, 2
    for name, value in record.items():
        row[name] = value
    assert fate_of(row, finish) == fate


def test_four_hundred_at_once_are_all_served() -> None:
    """As ``vllm bench serve`` sends them at an infinite rate: whoever is below the limit of open requests is served."""
    assert Options("dummy:tiny").max_requests >= 400
    server = Served()

    async def all_of_them() -> list[int]:
        most = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=240.0, trust_env=False, limits=most) as client:
            body = {"prompt": PROMPT, **GREEDY, "max_tokens": 2, "stream": True}
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(400)))
            return [answer.status_code for answer in answers if answer.text.endswith("[DONE]\n\n")]

    try:
        assert asyncio.run(all_of_them()) == [200] * 400
        found = figures(server)
        assert found["vllm:request_success_total"][("length",)] == 400
        assert sum(found["slalom:requests_refused_total"].values()) == 0
    finally:
        server.close()
