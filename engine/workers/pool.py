"""Instances in other processes: one process per GPU holds weights and KV, this one holds the scheduler and the door.

Steps go to a worker over a connection of their lane; KV goes from worker to worker, pulled by the receiver
(``engine.workers.kv``). When a worker dies, hangs or cannot be reached, its instances are lost and what they had
is computed by the others; nothing else notices. A lost worker does not come back before ``serve`` is started anew.

On one machine, ``serve --model M --instances 2 --roles prefill,decode --workers 2`` starts both (worker ``k`` on
GPU ``k`` with ``--device cuda``). On several, with the same ``SLALOM_KEY`` in every environment::

    host1$ serve-worker --model M --listen host1:7001 --device cuda
    host2$ serve-worker --model M --listen host2:7001 --device cuda
    host1$ serve --model M --instances 2 --roles prefill,decode --workers host1:7001,host2:7001

The key authenticates the processes to each other; nothing is encrypted, so keep the ports inside a trusted network.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from engine.core.state import ClusterState
from engine.errors import SlalomError
from engine.kernels import Spans
from engine.lanes.partitions import Cuts, cuts_of, partition_of
from engine.latency.evaluate import PROFILE, SHARE
from engine.live.hosts import GraphSizes, InstanceLost
from engine.live.transfer import Transfer
from engine.model.config import ModelConfig
from engine.model.sampling import Logprobs, SamplingParams
from engine.workers.kv import check_pipe
from engine.workers.lease import LEASE_S
from engine.workers.wire import KEY, ask, connect, hang_up, parse_address, step_message

_log = logging.getLogger("slalom.distributed")
_START_S = 600.0  # to load the weights


class RemoteWorker:
    """One worker, as this process knows it.

    :param process: ours to end, where we started it
    """

    def __init__(self, address: tuple[str, int], process: subprocess.Popen[str] | None = None) -> None:
        self.address, self.process = address, process
        self._lock, self._lost = threading.Lock(), threading.Event()
        self._watchers: list[Callable[[Exception], None]] = []
        self._control = connect(address)
        #: Goes with every message: the worker answers its owner only.
        self.epoch: str = ask(self._control, {"do": "own"}, _START_S)["epoch"]
        self.about = self.ask({"do": "describe"})

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Before :meth:`guard` only."""
        return ask(self._control, message | {"epoch": self.epoch}, _START_S)

    def guard(self) -> None:
        """From now on hear of the worker's end at once: the connection is kept, and only the lease renewed on it."""
        threading.Thread(target=self._wait_for_its_end, name=f"worker-{self.address[1]}", daemon=True).start()

    def _wait_for_its_end(self) -> None:
        with suppress(EOFError, OSError, RuntimeError):
            while not self._control.poll(LEASE_S / 3.0):
                ask(self._control, {"do": "renew", "epoch": self.epoch}, LEASE_S)
        self.lose(InstanceLost(f"worker {self.address[0]}:{self.address[1]} has gone"))

    def watch(self, gone: Callable[[Exception], None]) -> None:
        """Call ``gone`` when the worker is lost."""
        self._watchers.append(gone)

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    def lose(self, error: Exception) -> None:
        """Never use it again: it is gone, or did not answer in time. What it may still do harms nobody."""
        with self._lock:
            if self._lost.is_set():
                return
            self._lost.set()
        if self.process is not None:
            self.process.kill()
        for gone in self._watchers:
            gone(error)

    def close(self) -> None:
        """Hang up; a worker that we started ends."""
        self._watchers.clear()
        self._lost.set()
        hang_up(self._control)  # or the thread that waits on it keeps the line, and the lease, for seconds more
        self._control.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                if stream is not None:
                    stream.close()


class RemotePool:
    """Stands for KV pool ``index`` of ``worker`` in a transfer."""

    def __init__(self, worker: RemoteWorker, index: int) -> None:
        self.worker, self.index = worker, index


class RemoteExecutor:
    """An :class:`engine.live.hosts.Executor` that asks a worker, which cuts its device as ``cuts`` says."""

    def __init__(
        self, worker: RemoteWorker, i: int, pool: int, l: int, timeout_s: float, graphs: GraphSizes, cuts: Cuts
    ) -> None:
        self._worker, self._timeout_s, self._cuts = worker, timeout_s, cuts
        self._connection = connect(worker.address)
        self.logprobs: Sequence[Logprobs | None] = ()
        self.prompt_logprobs: Sequence[Sequence[Logprobs]] = ()
        opening = {"do": "lane", "instance": i, "lane": l, "pool": pool, "graphs": list(graphs), "sizes": cuts.sizes}
        try:
            self.n_layers: int = ask(self._connection, opening | {"epoch": worker.epoch}, _START_S)["n_layers"]
        except RuntimeError as error:  # a partition or graph that cannot be had, say; the worker has said what to do
            host, port = worker.address
            raise SlalomError(f"worker {host}:{port}", f"lane {l}", str(error)) from error

    def partition(self, state: ClusterState, i: int, l: int) -> int:
        """See :class:`engine.live.hosts.Executor`."""
        return partition_of(state, self._cuts, i, l)

    def run(
        self,
        spans: Spans | None,
        layers: tuple[int, int],
        params: Sequence[SamplingParams],
        steps: Sequence[int],
        partition: int,
    ) -> list[int]:
        """See :class:`engine.live.hosts.Executor`."""
        try:
            message = step_message(spans, layers, params, steps)
            message |= {"epoch": self._worker.epoch, "partition": partition}
            answer = ask(self._connection, message, self._timeout_s)
        except (EOFError, OSError) as error:
            lost = InstanceLost(f"worker {self._worker.address[0]}:{self._worker.address[1]}: {error or 'gone'}")
            self._worker.lose(lost)
            raise lost from error
        self.logprobs = [p and _logprobs(p) for p in answer["logprobs"]]
        self.prompt_logprobs = [[_logprobs(p) for p in scored] for scored in answer["prompts"]]
        tokens: list[int] = answer["tokens"]
        return tokens


def _logprobs(found: Sequence[Any]) -> Logprobs:
    """As JSON gives it."""
    return Logprobs(found[0], tuple((token, log) for token, log in found[1]))


class RemoteHost:
    """A :class:`engine.live.hosts.Host` in a worker."""

    def __init__(
        self, worker: RemoteWorker, i: int, pool: int, step_timeout_s: float, graphs: GraphSizes, cuts: Cuts
    ) -> None:
        self._worker, self._i, self._timeout_s, self._graphs, self._cuts = worker, i, step_timeout_s, graphs, cuts
        self.pool = RemotePool(worker, pool)

    def executor(self, l: int) -> RemoteExecutor:
        """See :class:`engine.live.hosts.Host`."""
        return RemoteExecutor(self._worker, self._i, self.pool.index, l, self._timeout_s, self._graphs, self._cuts)

    def watch(self, gone: Callable[[Exception], None]) -> None:
        """See :class:`engine.live.hosts.Host`."""
        self._worker.watch(gone)

    def close(self) -> None:
        """See :class:`engine.live.hosts.Host`."""
        self._worker.close()


class RemoteTransport:
    """Asks the receiving worker to pull; used by the threads of the links, each with connections of its own.

    :param timeout_s: the worker gives up by itself after that; one that says nothing for three times as long is lost
    """

    def __init__(self, pipe: str, timeout_s: float) -> None:
        self._pipe, self._timeout_s = pipe, timeout_s
        self._own = threading.local()

    def copy(self, transfer: Transfer) -> None:
        """See :class:`engine.live.transfer.Transport`."""
        source, target = transfer.source, transfer.target
        assert isinstance(source, RemotePool)
        assert isinstance(target, RemotePool)
        connections: dict[Any, Connection] = self._own.__dict__  # this thread's
        receiver = target.worker
        if receiver.lost:
            raise ConnectionError("the receiver is gone")
        sender = None if source.worker is receiver else source.worker.address
        message = {
            "do": "fetch",
            "epoch": receiver.epoch,
            "pipe": self._pipe,
            "sender": sender,
            "sender_epoch": source.worker.epoch,
            "from": source.index,
            "to": target.index,
            "blocks": transfer.blocks,
            "timeout_s": self._timeout_s,
        }
        try:
            if receiver not in connections:
                connections[receiver] = connect(receiver.address)
            ask(connections[receiver], message, 3.0 * self._timeout_s)
        except (EOFError, OSError) as error:
            connections.pop(receiver).close() if receiver in connections else None
            receiver.lose(InstanceLost(f"worker {receiver.address[0]}:{receiver.address[1]}: {error or 'gone'}"))
            raise


class Workers:
    """The workers of one engine.

    :param pipe: how KV travels between them, a name of :data:`engine.workers.kv.PIPES`
    :param transfer_timeout_s: a KV transfer may take in each of its states
    :param step_timeout_s: a worker that takes longer for one step is lost
    """

    def __init__(
        self,
        workers: Sequence[RemoteWorker],
        *,
        pipe: str = "wire",
        transfer_timeout_s: float = 10.0,
        step_timeout_s: float = 120.0,
    ) -> None:
        self.workers = list(workers)
        self.transport = RemoteTransport(pipe, transfer_timeout_s)
        self._step_timeout_s = step_timeout_s

    @classmethod
    def start(
        cls, n: int, model: str, device: str, dtype: str, kernels: str = "auto", eager: bool = False, **options: Any
    ) -> Workers:
        """Start ``n`` workers on this machine; worker ``k`` gets GPU ``k`` where ``device`` is ``cuda``.

        :raises SlalomError: one of them did not come up; it has said why
        """
        check_pipe(options.get("pipe", "wire"))
        os.environ.setdefault(KEY, secrets.token_hex())
        begun: list[subprocess.Popen[str]] = []
        try:
            for k in range(n):
                where = f"cuda:{k}" if device == "cuda" else device
                command = [sys.executable, "-m", "engine.workers.worker", "--model", model, "--once"]
                command += ["--device", where, "--dtype", dtype, "--kernels", kernels]
                command += ["--eager"] * eager
                # Its standard input closes with this process, whatever ends it: then the worker ends too.
                begun.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            workers = []
            for process in begun:
                assert process.stdout is not None
                line = process.stdout.readline()
                if not line:
                    raise SlalomError("--workers", n, f"a worker ended with exit code {process.wait()}")
                host, port = json.loads(line)["listening"]
                workers.append(RemoteWorker((host, port), process))
            return cls(workers, **options)
        except BaseException:
            for process in begun:
                process.kill()
            raise

    @classmethod
    def join(cls, addresses: Sequence[str], **options: Any) -> Workers:
        """Use the workers that were started elsewhere, with the same secret in ``SLALOM_KEY``.

        :raises SlalomError: one cannot be reached
        """
        places = [parse_address(text) for text in addresses]
        check_pipe(options.get("pipe", "wire"), [host for host, _ in places])
        workers: list[RemoteWorker] = []
        for text, place in zip(addresses, places, strict=True):
            try:
                workers.append(RemoteWorker(place))
            except (EOFError, OSError, RuntimeError, AuthenticationError) as error:
                for worker in workers:  # others may have them
                    worker.close()
                why = f"it has another {KEY}" if isinstance(error, AuthenticationError) else error or "it hung up"
                raise SlalomError("--workers", text, f"cannot use it: {why}") from error
        return cls(workers, **options)

    def check(self, config: ModelConfig, dtype: str) -> None:
        """:param dtype: that of the model; ``auto``: what the first worker chose

        :raises SlalomError: a worker holds another model or number type
        """
        dtype = self.workers[0].about["dtype"] if dtype == "auto" else dtype
        for worker in self.workers:
            for name, found in worker.about.items():
                wanted = dtype if name == "dtype" else getattr(config, name, found)
                if found != wanted:
                    fix = f"here it is {wanted}: start every worker with the same model and type"
                    raise SlalomError(f"worker {worker.address[0]}:{worker.address[1]}: {name}", found, fix)

    def measured(self) -> tuple[np.ndarray, np.ndarray]:
        """A rough profile (:func:`engine.calibration.quick.measure`), taken by the first worker."""
        answer = self.workers[0].ask({"do": "measure"})
        share = np.frombuffer(bytes.fromhex(answer["share"]), SHARE).reshape(-1, answer["shares"])
        return np.frombuffer(bytes.fromhex(answer["profile"]), PROFILE).copy(), share.copy()

    def hosts(self, state: ClusterState, max_tokens: int | None = None) -> list[RemoteHost]:
        """Make the KV pools of ``state`` in the workers: an instance lives in the worker that its ``gpu`` names.

        :param max_tokens: of the longest request, for the graphs of a GPU; what the pools hold if not given
        :raises SlalomError: instances of one pool in different workers
        """
        homes: dict[int, int] = {}
        for i, instance in enumerate(state.inst):
            pool, home = int(instance["pool"]), int(instance["gpu"])
            if homes.setdefault(pool, home) != home:
                raise SlalomError(f"instances[{i}].pool", pool, "instances on one pool must be in one worker")
        for k, worker in enumerate(self.workers):
            blocks = {str(p): int(state.pool[p]["n_blocks"]) for p, home in homes.items() if home == k}
            worker.ask({"do": "pools", "blocks": blocks, "block_tokens": int(state.cluster[0]["block_tokens"])})
            worker.guard()
        graphs = GraphSizes.of(state, max_tokens)
        return [
            RemoteHost(self.workers[int(x["gpu"])], i, int(x["pool"]), self._step_timeout_s, graphs, cuts)
            for i, (x, cuts) in enumerate(zip(state.inst, cuts_of(state), strict=True))
        ]

    def close(self) -> None:
        """End those that we started."""
        for worker in self.workers:
            worker.close()
