"""The router in front of two real vLLM instances that hand KV over, on CPUs. Skipped where there are none.

``eval/benchmarks/vllm_cpu.sh .venv-vllm`` makes them, and then::

    SLALOM_VLLM=.venv-vllm python3 run.py test -n0 -m vllm tests/engine/test_remote_vllm.py

It takes 7 GB of memory and some minutes, most of them until the engines are up.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from remote_cases import Mock, Routed, routed
from waiting import free_port, until

from engine.remote.steps import read_steps, steps_so_far

VENV = Path(os.environ.get("SLALOM_VLLM", Path(__file__).resolve().parents[2] / ".venv-vllm")).absolute()
MODEL = os.environ.get("SLALOM_VLLM_MODEL", str(VENV / "smollm2"))
TOPICS = ("a river", "bread", "the moon", "a small town", "glass", "winter", "a bridge", "salt", "music", "an old map")
OPENINGS = ("Tell me about {}.", "The history of {}", "Q: What is {}? A:", "Once upon a time, {}", "How to draw {}:")
PROMPTS = [opening.format(topic) for topic in TOPICS for opening in OPENINGS]
STORY = " ".join(f"On day {k} the old woman walked from the river to the {t}." for k, t in enumerate(TOPICS * 12))
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
HAND_OVER = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not (VENV / "bin" / "python").exists(), reason="no vLLM here: eval/benchmarks/vllm_cpu.sh"),
]


class Vllm(Mock):
    """A vLLM instance on one core."""

    def __init__(self, core: int) -> None:
        super().__init__()
        self._core = core
        self.client = httpx.Client(base_url=self.url, timeout=120.0, trust_env=False)

    def start(self) -> Vllm:
        own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": str(self._core), "OMP_NUM_THREADS": "1"}
        own |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": "", "UCX_TLS": "tcp,sm,self"}
        own |= {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()), "VLLM_PLUGINS": "slalom,slalom_nixl"}
        command = [str(VENV / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL]
        command += ["--served-model-name", "smol", "--port", str(self.port), "--host", "127.0.0.1", "--enforce-eager"]
        command += ["--max-model-len", "2048", "--max-num-seqs", "16", "--scheduling-policy", "priority"]
        command += ["--enable-logging-iteration-details", "--kv-transfer-config", json.dumps(HAND_OVER)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=os.environ | own, start_new_session=True, **quiet)  # type: ignore[call-overload]
        return self

    def up(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, "vLLM ended"
        try:
            return self.client.get("/health").status_code == 200
        except httpx.HTTPError:
            return False

    def close(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its engine is a process of its own, in the same session
            self.process.wait()
        self.client.close()

    def pulled(self) -> float:
        """Prompt tokens whose KV came from another engine."""
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith("vllm:prompt_tokens_by_source_total") and 'source="external_kv_transfer"' in line:
                return float(line.rpartition(" ")[2])
        return 0.0


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Vllm]]:
    engines = [Vllm(core % (os.cpu_count() or 1)).start() for core in range(2)]
    try:
        for engine in engines:
            until(engine.up, 600.0)
        yield engines
    finally:
        for engine in engines:
            engine.close()


def text_of(client: httpx.Client, prompt: str, *, stream: bool = False, **options: Any) -> str:
    """A greedy completion."""
    answer = client.post(
        "/v1/completions", json=GREEDY | {"model": "smol", "prompt": prompt, "stream": stream} | options
    )
    assert answer.status_code == 200, answer.text
    if not stream:
        return str(answer.json()["choices"][0]["text"])
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return "".join(c["text"] for line in lines[:-1] for c in json.loads(line)["choices"])


@pytest.fixture(scope="module")
def plain(pair: list[Vllm]) -> Iterator[Routed]:
    with routed(
        pair, policy="round_robin", engine_deadlines=True, max_batch=16, health_s=1.0, health_timeout_s=10.0
    ) as router:
        yield router


def test_greedy_tokens_through_the_router_are_the_engine_s_own(pair: list[Vllm], plain: Routed) -> None:
    for k, prompt in enumerate(PROMPTS):
        stream = k % 2 == 0
        assert text_of(plain.client, prompt, stream=stream) == text_of(pair[0].client, prompt, stream=stream), prompt


def test_a_prompt_computed_elsewhere_gives_the_same_answer(pair: list[Vllm]) -> None:
    words = STORY.split()
    prompts = [" ".join(words[11 * k : 11 * k + n]) for k, n in enumerate((30, 60, 100, 200, 400, 800))]
    alone = [text_of(pair[0].client, prompt, max_tokens=24) for prompt in prompts]
    before = pair[1].pulled()
    options: dict[str, Any] = {"kv_transfer": True, "roles": "prefill,decode", "policy": "static_split"}
    with routed(pair, health_s=1.0, health_timeout_s=10.0, **options) as router:
        for k, (prompt, expected) in enumerate(zip(prompts, alone, strict=True)):
            assert text_of(router.client, prompt, stream=k % 2 == 0, max_tokens=24) == expected
        assert int(router.router.state.cluster[0]["n_migrated"]) == len(prompts)
        assert not router.router.instances.retried
    assert pair[1].pulled() - before > 1000


def test_the_queue_inside_the_engine_is_by_deadline(pair: list[Vllm]) -> None:
    """More sequences than it runs at once: those that are due first start first."""
    with routed(pair[:1], engine_deadlines=True, max_batch=64, chunk_tokens=65_536) as router:
        patient = httpx.Client(base_url=router.url, timeout=600.0, trust_env=False)
        full = [  # they end one after the other
            threading.Thread(target=text_of, args=(patient, prompt), kwargs={"max_tokens": 40 + 6 * k})
            for k, prompt in enumerate(PROMPTS[:16])
        ]
        order: list[float] = []

        def late(due_s: float) -> None:
            headers = {"x-slo-ttft-ms": str(1000.0 * due_s)}
            patient.post("/v1/completions", json=GREEDY | {"prompt": f"due in {due_s}"}, headers=headers)
            order.append(due_s)

        dues = (500.0, 300.0, 100.0, 400.0, 200.0)
        waiting = [threading.Thread(target=late, args=(due,)) for due in dues]
        for thread in (*full, *waiting):
            thread.start()
        for thread in (*full, *waiting):
            thread.join()
        assert order == sorted(dues)


def test_the_plug_in_tells_the_steps(pair: list[Vllm]) -> None:
    before = steps_so_far(pair[0].url)
    assert before is not None
    text_of(pair[0].client, "What the steps say about " + STORY[:200])
    steps = read_steps(pair[0].url, before)
    assert steps["decodes"].sum() == 7
    assert steps["prompt_tokens"].sum() > 40
    assert (steps["elapsed_s"] > 0).all()
