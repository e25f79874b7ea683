"""What listens where: every socket of ``serve``, its workers, ``route`` and Ray, found as a port scan would.

By default nothing can be reached from another machine. What ``docs/security.md`` says of addresses that can be is
tested with further loopback addresses in the place of such ones.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from multiprocessing import AuthenticationError
from multiprocessing.connection import deliver_challenge
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
from remote_cases import mocks

from engine.errors import SlalomError
from engine.jit.sources import ROOT
from engine.server.ending import reserve
from engine.workers.pool import Workers
from engine.workers.wire import KEY, listen, parse_address
from policies.serve import Options, build

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux")

LISTENS, SECRET = "0A", "k" * 20
BODY = {"prompt": "the gate is open", "temperature": 0, "ignore_eos": True, "max_tokens": 8}
MODEL = ("--model", "dummy:tiny", "--profile", "smollm2-cpu")


def processes(root: int) -> list[int]:
    """``root`` and all that it started."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def address_of(text: str) -> tuple[str, int]:
    """``0100007F:1F90`` as the kernel writes it: words of 4 bytes, each in the machine's order."""
    host, port = text.split(":")
    raw = b"".join(bytes.fromhex(host[at : at + 8])[::-1] for at in range(0, len(host), 8))
    address: IPv4Address | IPv6Address = ip_address(raw)
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address), int(port, 16)


def listeners(root: int) -> set[tuple[str, int]]:
    """(address, port) of every socket on which a process of the family listens."""
    inodes = set()
    for process in processes(root):
        for link in Path(f"/proc/{process}/fd").glob("*"):
            try:
                inodes.update(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
            except OSError:
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{root}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTENS and words[9] in inodes:
                found.add(address_of(words[1]))
    return found


@contextmanager
def started(*command: str, says: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A command that runs, and what it said once it was ready."""
    process = subprocess.Popen(
        [sys.executable, *(() if command[0].endswith(".py") else ("-m",)), *command], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", KEY: "only for these tests"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if says in line:
                break
        else:
            pytest.fail("".join(said))
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield process, line
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def worker(address: str) -> Iterator[tuple[int, str]]:
    with started("engine.workers.worker", "--model", "dummy:tiny", "--listen", f"{address}:0", says="listening") as (
        process,
        line,
    ):
        host, port = json.loads(line)["listening"]
        yield process.pid, f"{host}:{port}"


@contextmanager
def serving(*options: str) -> Iterator[tuple[int, int]]:
    with started("policies.serve", *MODEL, "--port", "0", *options, says="serving") as (process, line):
        found = re.search(r"http://[^ ]*:(\d+)", line)
        assert found is not None
        yield process.pid, int(found.group(1))


def ask(port: int, host: str = "127.0.0.1") -> None:
    url, headers = f"http://{host}:{port}/v1/completions", {"authorization": f"Bearer {SECRET}"}
    transport = httpx.HTTPTransport(retries=6)  # the address is said a moment before the door opens
    with httpx.Client(transport=transport, headers=headers, timeout=60.0, trust_env=False) as client:
        answers = [client.post(url, json=BODY) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]


PD = ("--instances", "2", "--roles", "prefill,decode")


@pytest.mark.slow
def test_by_default_serve_and_its_workers_can_be_reached_from_this_machine_only(tmp_path: Path) -> None:
    with serving(*PD, "--workers", "2", "--decision-log", str(tmp_path / "decisions.jsonl")) as (root, port):
        ask(port)  # KV has moved: the pairs are open
        found = listeners(root)
    assert ("127.0.0.1", port) in found
    assert {host for host, _ in found} == {"127.0.0.1"}


@pytest.mark.slow
def test_addresses_of_their_own_are_listened_on_and_no_others() -> None:
    """127.0.0.2, .3 and .4 stand for three machines."""
    with ExitStack() as stack:
        first, second = (stack.enter_context(worker(host)) for host in ("127.0.0.2", "127.0.0.3"))
        workers = f"{first[1]},{second[1]}"
        options = ("--workers", workers, "--host", "127.0.0.4", "--api-key", SECRET)
        root, port = stack.enter_context(serving(*PD, *options))
        ask(port, "127.0.0.4")
        assert listeners(root) == {("127.0.0.4", port)}
        for process, address in (first, second):  # KV has moved, by the one door that asks for the key
            assert listeners(process) == {parse_address(address)}
        assert httpx.get(f"http://127.0.0.4:{port}/metrics", trust_env=False, timeout=60.0).status_code == 401


def test_the_router_has_one_door_and_it_is_of_this_machine() -> None:
    with mocks(1) as engines:
        arguments = ("--engines", engines[0].url, "--profile", "smollm2-cpu", "--port", "0")
        with started("policies.route", *arguments, says="routing") as (process, line):
            found = re.search(r"http://127.0.0.1:(\d+)", line)
            assert found is not None, line
            ask(int(found.group(1)))
            assert listeners(process.pid) == {("127.0.0.1", int(found.group(1)))}


RAY = """
import sys
from env.measure.pool import RayExecutor, connect
connect("auto", cores=1)
import ray
assert RayExecutor().submit(abs, -7).result() == 7
print("computing at", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
SECOND = """
from env.measure.pool import RayExecutor, connect
connect("auto")
assert RayExecutor().submit(abs, -7).result() == 7
import ray
print(ray.get_runtime_context().gcs_address)
"""


@pytest.mark.slow
def test_ray_that_we_start_is_of_this_machine_and_asks_for_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    script = tmp_path / "script.py"
    script.write_text(RAY)
    with TemporaryDirectory() as short, ExitStack() as stack:  # Ray's sockets have no room for a long path
        for name, value in {"HOME": tmp_path, "RAY_TMPDIR": short, "RAY_ADDRESS": "", "PYTHONPATH": ROOT}.items():
            monkeypatch.setenv(name, str(value))
        process, line = stack.enter_context(started(str(script), says="computing"))
        found = listeners(process.pid)
        assert len(found) > 3
        assert {host for host, _ in found} == {"127.0.0.1"}
        token = tmp_path / ".ray" / "auth_token"
        assert token.stat().st_mode & 0o777 == 0o600
        at = line.split()[-1]
        joining = [sys.executable, "-c", SECOND]
        done = subprocess.run(joining, capture_output=True, text=True)
        assert done.stdout == at + "\n", done.stderr
        strange = os.environ | {"RAY_AUTH_MODE": "disabled"}  # it asks without the token
        with suppress(subprocess.TimeoutExpired):  # it is refused, and goes on asking
            done = subprocess.run(joining, env=strange, capture_output=True, text=True, timeout=40.0)
            assert at not in done.stdout


def test_without_workers_there_is_one_door_and_it_is_of_this_machine() -> None:
    before = listeners(os.getpid())
    engine, application = build(Options("dummy:tiny", profile="smollm2-cpu"))
    try:
        assert listeners(os.getpid()) == before  # nothing but what the command itself opens:
        with reserve(Options("dummy:tiny").host, 0) as door:
            assert door.getsockname()[0] == "127.0.0.1"
    finally:
        engine.close(5.0)
        assert application.state is not None


def test_a_worker_with_another_key_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "only for these tests")
    listener = listen(("127.0.0.1", 0))

    def welcome() -> None:
        with suppress(AuthenticationError, EOFError, OSError):
            connection = listener.accept()
            deliver_challenge(connection, b"another one")

    threading.Thread(target=welcome, daemon=True).start()
    address = "{}:{}".format(*listener.address)
    with pytest.raises(SlalomError) as caught:
        Workers.join([address])
    assert str(caught.value) == f"--workers: got '{address}'; cannot use it: it has another SLALOM_KEY"
