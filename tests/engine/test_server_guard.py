"""The guard in a running server: swaps, modes, metrics, log and dashboard while clients are being served."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_server import GREEDY, PROMPT, Served
from waiting import until

from engine.errors import SlalomError
from policies.serve import Options, build

SWAPS = 100


@pytest.fixture(scope="module")
def log_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "decisions.jsonl"


@pytest.fixture(scope="module")
def served(log_path: Path) -> Iterator[Served]:
    options: dict[str, Any] = {"policy": "predicted_ttft", "reallocate": True, "deadline_us": 50_000}
    server = Served(instances=2, decision_log=str(log_path), **options)
    yield server
    server.close()


@contextmanager
def load(server: Served, clients: int = 3) -> Iterator[list[int]]:
    """Clients that send one request after the other; gives the status codes they got."""
    statuses: list[int] = []
    over = threading.Event()

    def client() -> None:
        with httpx.Client(base_url=server.url, timeout=60.0, trust_env=False) as http:
            while not over.is_set():
                statuses.append(http.post("/v1/completions", json={"prompt": PROMPT, **GREEDY}).status_code)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        over.set()
        for thread in threads:
            thread.join(60.0)
        assert set(statuses) <= {200}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(server: Served) -> dict[str, dict[tuple[str, ...], float]]:
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    return {f.name: {tuple(s.labels.values()): s.value for s in f.samples} for f in families}


def test_a_hundred_swaps_under_load_lose_nothing(served: Served, log_path: Path) -> None:
    names = ["least_tokens", "predicted_ttft", "round_robin", "linear_score:p_kv=2.0"]
    with load(served) as statuses:
        until(lambda: len(statuses) > 3)
        before = served.engine.runtime.guard.report().generation
        for k in range(SWAPS):
            answer = served.post("/admin/policy", {"policy": names[k % len(names)]})
            assert answer.status_code == 200, answer.text
            assert answer.json()["policy"]["name"] == names[k % len(names)].partition(":")[0]
            if k % 5 == 0:  # however slow the machine, requests are served between swaps
                seen = len(statuses)
                until(lambda seen=seen: len(statuses) > seen)
        n = len(statuses)
        until(lambda: len(statuses) > n + 3)
    report = served.engine.runtime.guard.report()
    assert report.generation == before + SWAPS
    assert set(served.engine.runtime.fallbacks) <= {"deadline"}, "a slow machine may be late, nothing else"
    until(lambda: sum(line["type"] == "policy" for line in lines(log_path)) == SWAPS + 1 + before)
    decided = [line for line in lines(log_path) if line["type"] == "decision"]
    assert [line["seq"] for line in decided] == list(range(1, len(decided) + 1))
    generations = [line["generation"] for line in decided]
    assert generations == sorted(generations)
    assert len(set(generations)) > 10
    found = metrics(served)
    assert found["slalom:policy_swaps"][()] >= SWAPS


def test_a_policy_that_cannot_be_had_leaves_the_present_one(served: Served) -> None:
    name = served.engine.runtime.policy.name
    answer = served.post("/admin/policy", {"policy": "no_such_rule"})
    assert (answer.status_code, served.engine.runtime.policy.name) == (400, name)


def test_outcomes_stand_beside_predictions(served: Served, log_path: Path) -> None:
    answer = served.post("/v1/completions", {"prompt": PROMPT, **GREEDY})
    number = int(answer.json()["id"].rpartition("-")[2])

    def about() -> list[dict[str, Any]]:
        return [line for line in lines(log_path) if line.get("request") == number]

    until(lambda: len(about()) >= 2)
    decision, outcome = about()[0], about()[-1]
    assert decision["type"] == "decision"
    assert decision["context"]["prompt"] == answer.json()["usage"]["prompt_tokens"]
    assert outcome["type"] == "outcome"
    assert outcome["ttft_s"] > 0
    assert outcome["predicted_ttft_s"] > 0
    assert outcome["tpot_s"] > 0
    assert outcome["finish"] == "done"


def test_modes_by_administration(served: Served) -> None:
    with load(served) as statuses:
        until(lambda: len(statuses) > 1)
        assert served.post("/admin/mode", {"mode": "frozen", "restore": True}).json()["guard"]["mode"] == "frozen"
        frozen = served.engine.runtime.fallbacks["frozen"]
        n = len(statuses)
        until(lambda: len(statuses) > n + 4)
        assert served.engine.runtime.fallbacks["frozen"] > frozen
        assert metrics(served)["slalom:policy_mode"][("frozen",)] == 1.0
        assert served.post("/admin/mode", {"mode": "advisory"}).json()["guard"]["mode"] == "advisory"
        advised = served.engine.runtime.guard.report().advised
        until(lambda: served.engine.runtime.guard.report().advised > advised)
        assert served.post("/admin/mode", {"mode": "active"}).json()["guard"]["mode"] == "active"
    assert served.post("/admin/mode", {"mode": "wild"}).status_code == 400


class Garbage:
    """Answers a row that does not exist."""

    name, needs, arrangement = "garbage", 1, None

    def __init__(self) -> None:
        import numpy as np

        self.params = self.memory = np.zeros(1)

    def decide(self, *question: Any) -> int:
        return 10**6

    def describe(self) -> dict[str, Any]:
        return {"kind": "python"}


def test_a_bad_policy_is_seen_in_metrics_and_log_and_hurts_nobody(served: Served, log_path: Path) -> None:
    engine = served.engine
    engine.set_policy(engine.runtime.guard.prepare(Garbage()))
    with load(served) as statuses:
        until(lambda: engine.runtime.guard.report().breaker == "open")
        n = len(statuses)
        until(lambda: len(statuses) > n + 3)
    found = metrics(served)
    failures = found["slalom:policy_fallback"]
    assert failures[("invalid",)] + failures.get(("deadline",), 0) >= 5
    assert failures[("invalid",)] >= 1, "a slow machine may be late at times"
    assert found["slalom:policy_fallback"][("breaker",)] >= 1
    assert found["slalom:policy_breaker_state"][()] == 2.0
    assert found["slalom:policy_answers"][("invalid",)] == failures[("invalid",)]
    assert found["slalom:policy_decision_seconds"][("+Inf",)] == sum(found["slalom:policy_answers"].values())
    assert found["slalom:decision_log_records"][("dropped",)] == 0
    assert {"slalom:drift_ratio", "slalom:drift_alarm", "slalom:sm_share"} <= set(found)
    until(lambda: any(line["type"] == "breaker" and line["state"] == "open" for line in lines(log_path)))
    bad = [line for line in lines(log_path) if line.get("reason") == "invalid"]
    assert bad
    assert all(line["fallback"] and line["candidates"] for line in bad)
    assert served.post("/admin/policy", {"policy": "predicted_ttft"}).json()["guard"]["breaker"] == "closed"


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("fallback", "no_such_rule", "policy"),
        ("guard_config", "/nowhere.yaml", "guard-config"),
        ("decision_log", "/proc/nowhere/log", "decision log"),
    ],
)
def test_bad_options_are_one_line(option: str, value: str, named: str) -> None:
    with pytest.raises(SlalomError, match=named):
        build(Options("dummy:tiny", **{option: value}))


# -- dashboard


def test_dashboard_state_and_events(served: Served) -> None:
    with load(served) as statuses:
        until(lambda: len(statuses) > 0)
        state = served.client.get("/dashboard/state").json()
        assert [x["role"] for x in state["instances"]] == ["mixed", "mixed"]
        assert state["guard"]["recent"]
        with served.client.stream("GET", "/dashboard/events") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            data = [line for line, _ in zip(filter(None, response.iter_lines()), range(3), strict=False)]
    events = [json.loads(line.removeprefix("data: ")) for line in data if line.startswith("data: ")]
    assert events[1]["now_s"] > events[0]["now_s"]
    page = served.client.get("/dashboard").text
    assert "EventSource" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page, "self-contained"


@contextmanager
def browser(folder: Path) -> Iterator[httpx.Client]:
    """A headless Chromium behind chromedriver, spoken to in the WebDriver protocol."""
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("chromium-browser")
    if driver is None or chromium is None:
        pytest.skip("needs chromium and chromedriver")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        started = next(line for line in process.stdout if "successfully on port" in line)
        port = started.rstrip(". \n").rpartition(" ")[2]
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-dev-shm-usage", "--window-size=1360,1500", f"--user-data-dir={folder}",
        ]  # fmt: skip
        capabilities = {"alwaysMatch": {"goog:chromeOptions": {"args": flags, "binary": chromium}}}
        root = f"http://127.0.0.1:{port}/session"
        with httpx.Client(timeout=60.0, trust_env=False) as client:
            session = client.post(root, json={"capabilities": capabilities}).json()["value"]["sessionId"]
            client.base_url = f"{root}/{session}"
            try:
                yield client
            finally:
                client.delete(f"{root}/{session}").raise_for_status()
    finally:
        process.terminate()
        process.wait(10)


def run_script(client: httpx.Client, script: str) -> Any:
    return client.post("/execute/sync", json={"script": script, "args": []}).json()["value"]


@pytest.mark.slow
def test_the_dashboard_lives_in_a_browser(served: Served, tmp_path: Path) -> None:
    with browser(tmp_path) as chromium, load(served):
        chromium.post("/url", json={"url": f"{served.url}/dashboard"})
        end = time.monotonic() + 30.0
        while int(run_script(chromium, "return document.body.dataset.updates || 0")) < 3 and time.monotonic() < end:
            time.sleep(0.2)
        text = run_script(chromium, "return document.body.innerText")
        rows = run_script(chromium, "return document.querySelectorAll('#decisions tr').length")
        first = run_script(chromium, "return document.querySelector('#k-req small').innerText")
        until(lambda: run_script(chromium, "return document.querySelector('#k-req small').innerText") != first)
    assert "mixed" in text
    assert served.engine.runtime.policy.name in text
    assert "place prefill" in text
    assert rows > 3
