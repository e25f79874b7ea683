"""Steps that an engine tells while it serves others: a small engine with known step times is the oracle."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import SlalomError
from engine.latency.profile import Profile
from engine.remote.steps import STEP, paced
from eval.calibrate.cli import Options, calibrate
from eval.calibrate.watched import points_of

KV_TOKENS, BATCH, HOST_S = 16_000, 8, 0.004
FIELDS = ("number", "end", "prompts", "prompt_tokens", "decodes", "elapsed_ms", "running", "waiting", "kv")


def step_s(prompt: int, bs: int, ctx: float) -> float:
    """A decode step reads the weights (8 ms), which a fused one does once."""
    decode = 0.008 + 0.002 * bs + 2e-6 * ctx if bs else 0.0
    prefill = 0.010 + 5e-4 * prompt + 5e-8 * prompt**2 if prompt else 0.0
    return decode + prefill - (0.008 if prompt and bs else 0.0)


def told(n: int, rate: float, *, scatter: float = 0.0, first: int = 1) -> list[list[float]]:
    """Rows of ``FIELDS``: an engine that computes for a step what it says, and ``HOST_S`` before it.

    :param scatter: share of the steps that take four times as long
    """
    dice = np.random.default_rng(first)
    arrival = np.cumsum(dice.exponential(1.0 / rate, n))
    prompt, output = dice.integers(16, 1200, n), dice.integers(4, 60, n)
    waiting, running, given = list(range(n)), list[int](), np.zeros(n, int)
    now, number, rows = 0.0, first, list[list[float]]()
    while waiting or running:
        new = waiting[:1] if waiting and arrival[waiting[0]] <= now and len(running) < BATCH else []
        if not new and not running:
            now, number = float(arrival[waiting[0]]), number + 1  # what vLLM counts when it falls idle
            continue
        context = float(sum(prompt[r] + given[r] for r in running))
        took = step_s(int(prompt[new].sum()), len(running), context) * (4.0 if dice.random() < scatter else 1.0)
        now += took + HOST_S
        given[[*running, *new]] += 1
        used = float(sum(prompt[r] + given[r] for r in [*running, *new]))
        decodes, waiting = len(running), waiting[len(new) :]
        running = [r for r in [*running, *new] if given[r] < output[r]]
        late = float(sum(arrival[r] <= now for r in waiting))
        row = [number, now, len(new), int(prompt[new].sum()), decodes, 1e3 * took, len(running), late, used / KV_TOKENS]
        rows.append(row)
        number += 1
    return rows


@contextmanager
def engine(rows: list[list[float]]) -> Iterator[str]:
    """The address of one that answers as vLLM does with our plug-in."""
    cache = f'vllm:cache_config_info{{block_size="16",num_gpu_blocks="{KV_TOKENS // 16}"}} 1.0\n'

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, query = self.path.partition("?since=")
            steps = [row for row in rows if row[0] > int(query or 0)]
            said: Any = {
                "/v1/models": {"data": [{"id": "made", "owned_by": "vllm", "max_model_len": 2048}]},
                "/slalom/steps": {"fields": FIELDS, "steps": steps},
            }.get(path, {})
            body = cache.encode() if path == "/metrics" else json.dumps(said).encode()
            self.send_response(200 if said or path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def watched(urls: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Profile, dict[str, Any]]:
    calibrate(**vars(Options(out, engine=",".join(urls), watch=True, budget="0.1", as_json=True)))
    return Profile.load(out), json.loads(capsys.readouterr().out)


def test_two_engines_are_watched_and_their_steps_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = told(150, 1.2), told(150, 1.6, first=500)
    with engine(rows[0]) as one, engine(rows[1]) as two:
        profile, said = watched([one, two], tmp_path / "made.json", capsys)
    assert profile.kv_tokens == KV_TOKENS
    assert not said["poor_fit"]
    assert set(said["steps"]) == {"prefill", "decode", "fused"}
    assert sum(e["n"] for e in said["steps"].values()) == sum(round(0.2 * len(told)) for told in rows)  # each once
    assert all(abs(e["bias"]) < 0.05 and e["mape"] < 0.07 for e in said["steps"].values())
    for n in (100, 400, 1000):
        assert profile.prefill_s(n) == pytest.approx(step_s(n, 0, 0) + HOST_S, rel=0.07)
    for bs in (1, 4, 7):
        assert profile.decode_s(bs * 600, bs) == pytest.approx(step_s(0, bs, bs * 600) + HOST_S, rel=0.07)


def test_steps_that_scatter_count_as_their_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One step in five takes four times as long: 1.6 times on average."""
    with engine(told(600, 0.7, scatter=0.2)) as url:
        profile, _ = watched([url], tmp_path / "made.json", capsys)
    ratios = [profile.decode_s(bs * 600, bs) / (1.6 * step_s(0, bs, bs * 600) + HOST_S) for bs in (1, 2, 3)]
    assert float(np.mean(ratios)) == pytest.approx(1.0, abs=0.1)


def test_a_pause_between_steps_is_nobodys_time() -> None:
    steps = np.zeros(4, STEP)
    steps["number"], steps["running"] = [1, 2, 4, 5], [1, 0, 1, 0]
    steps["end_s"], steps["elapsed_s"] = [10.0, 10.03, 95.0, 95.05], [0.02, 0.02, 0.02, 0.04]
    np.testing.assert_allclose(paced(steps)["elapsed_s"], [0.03, 0.03, 0.03, 0.05], atol=1e-9)
    steps["number"] = [1, 2, 3, 4]  # an engine that counts no pause had nobody to go on with
    np.testing.assert_allclose(paced(steps)["elapsed_s"], [0.03, 0.03, 0.03, 0.05], atol=1e-9)


def test_steps_of_several_prompts_are_left_out() -> None:
    steps = np.zeros(3, STEP)
    steps["prompts"], steps["prompt_tokens"], steps["decodes"], steps["elapsed_s"] = (
        [1, 2, 0],
        [9, 9, 0],
        [2, 2, 2],
        0.1,
    )
    assert [(m.point.n, m.point.bs) for m in points_of(steps, KV_TOKENS)] == [(9, 2), (0, 2)]


def test_an_engine_that_tells_too_little_is_refused_by_name(tmp_path: Path) -> None:
    def refused(rows: list[list[float]], match: str) -> None:
        with engine(rows) as url, pytest.raises(SlalomError, match=match):
            calibrate(**vars(Options(tmp_path / "x.json", engine=url, watch=True, budget="0.1")))

    refused([], "plug-in")
    refused(told(2, 1.0), "watch longer")
    with pytest.raises(SlalomError, match="--engine"):
        calibrate(**vars(Options(tmp_path / "x.json", watch=True, budget="0.1")))
