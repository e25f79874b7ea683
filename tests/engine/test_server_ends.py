"""Ends are said: a port that is taken, a device that is not there, requests that the end of a server cuts off."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from typing import Any

import httpx
import pytest
import torch
from test_runtime_faults import Killer, killer  # noqa: F401  (a fixture)
from test_server import GREEDY, PROMPT, ROOT, Served, events
from waiting import until

from engine.errors import SlalomError
from engine.model import ModelRunner
from engine.model.device import choose_device
from engine.server.ending import reserve
from policies.serve import Options, build

LONG: dict[str, Any] = {"prompt": PROMPT, **GREEDY, "max_tokens": 4000}


def test_a_port_that_is_taken_is_said_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SlalomError, match=f"--port: got {port}"):
            reserve("127.0.0.1", port)
        done = subprocess.run(
            [sys.executable, "-m", "policies.serve", "--model", "no such model", "--port", str(port)],
            cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"serve: --port: got {port}")
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(SlalomError, match="--host"):
        reserve("no.such.host.invalid", 0)
    reserve("127.0.0.1", port).close()


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "meta", "mps"])
def test_devices_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(SlalomError, match="--device"):
        choose_device(name)
    with pytest.raises(SlalomError, match="--device"):
        build(Options("dummy:tiny", device=name))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_cuda_without_a_gpu_is_one_line() -> None:
    with pytest.raises(SlalomError, match=r"--device: got 'cuda'"):
        build(Options("dummy:tiny", device="cuda"))


def test_requests_that_the_end_cuts_off_hear_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream ends with an event and [DONE], another request with 503; nothing breaks in the middle."""
    server = Served(drain_s=0.3)
    go_on = threading.Event()
    run_layers = ModelRunner.run_layers

    def slow(self: ModelRunner, *args: Any) -> Any:
        go_on.wait(0.02)
        return run_layers(self, *args)

    monkeypatch.setattr(ModelRunner, "run_layers", slow)
    whole: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: whole.append(server.post("/v1/completions", LONG)))
    with httpx.Client(base_url=server.url, timeout=60.0, trust_env=False) as client:
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            asking.start()
            until(lambda: server.engine.n_open == 2)
            server.server.should_exit = True
            rest = httpx.Response(200, text="\n".join(lines))
        found = events(rest)
    asking.join(60)
    go_on.set()
    assert found[-1]["error"]["code"] == 503
    assert all("choices" in chunk for chunk in found[:-1])
    assert whole[0].status_code == 503
    assert whole[0].headers["content-type"] == "application/json"
    server.close()


def test_where_nothing_will_ever_serve_again_nobody_is_told_to_come_back(killer: Killer) -> None:  # noqa: F811
    server = Served()
    try:
        server.engine.drain()
        assert server.post("/v1/completions", LONG).headers["retry-after"] == "1"
        server.engine.undrain()
        killer.strike("instance-0-lane-0")
        assert server.post("/v1/completions", LONG).status_code == 503
        gone = server.post("/v1/completions", LONG)
        assert gone.status_code == 503
        assert "retry-after" not in gone.headers
    finally:
        server.close()
