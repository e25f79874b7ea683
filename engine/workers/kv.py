"""KV between processes: the receiver asks for blocks, the sender sends them, and a pair that broke is made anew.

Each link of a receiver keeps one connection to each sender, and with it one byte path (:class:`Pipe`) for two. They
are opened together and closed together on the first error, so a peer that died takes nothing but its own pair along,
and the next transfer starts with a fresh one. Every wait has an end.

Pipes: ``wire`` (the pair's own connection, on which both have proved to know the key; for any device, GPU tensors
through host memory) and ``nccl`` (torch.distributed between GPUs of one machine). NCCL's sockets and the store in which
its two ends find each other ask for no key, so they stay on loopback. What touches a GPU here is not yet verified on
GPU.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from ipaddress import ip_address
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import SlalomError
from engine.model.kv import KVPool
from engine.workers.wire import ask, connect, fill, pour, receive, send

#: Blocks that travel together; also what is staged at both ends.
_CHUNK = 64
_LOOPBACK = "127.0.0.1"


class Pipe(Protocol):
    """One contiguous tensor at a time from the sender to the receiver, in order. Both sides know its shape."""

    def send(self, tensor: Tensor, timeout_s: float) -> None:
        """Raises in ``timeout_s`` seconds at the latest when the receiver does not take it."""
        ...

    def receive(self, tensor: Tensor, timeout_s: float) -> None:
        """Fill ``tensor``; raises in ``timeout_s`` seconds at the latest when nothing comes."""
        ...

    def close(self) -> None:
        """Break the pair."""
        ...


class _WirePipe:
    """Bytes over the pair's connection, between its messages."""

    def __init__(self, connection: Connection, rank: int, timeout_s: float) -> None:
        self._connection = connection

    def send(self, tensor: Tensor, timeout_s: float) -> None:
        pour(self._connection, _bytes_of(tensor.cpu()), timeout_s)

    def receive(self, tensor: Tensor, timeout_s: float) -> None:
        staged = torch.empty_like(tensor, device="cpu") if tensor.is_cuda else tensor
        fill(self._connection, _bytes_of(staged), timeout_s)
        if staged is not tensor:
            tensor.copy_(staged)
            torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        return  # the pair closes its connection


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor of the host."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class _NcclPipe:
    """A torch.distributed process group of two; the sender is rank 0 and keeps the store."""

    def __init__(self, connection: Connection, rank: int, timeout_s: float) -> None:
        wait = timedelta(seconds=timeout_s)
        if rank == 0:
            store = _store(wait)
            send(connection, {"store": store.port})
        else:
            port = receive(connection, timeout_s)["store"]
            store = dist.TCPStore(_LOOPBACK, port, is_master=False, timeout=wait)
        kind: Any = dist.ProcessGroupNCCL
        options = kind.Options()
        options._timeout = wait
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a timeout must end the waiting thread, not the process
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        self._other, self._group = 1 - rank, kind(store, rank, 2, options)

    def send(self, tensor: Tensor, timeout_s: float) -> None:
        self._group.send([tensor], self._other, 0).wait(timedelta(seconds=timeout_s))
        torch.cuda.current_stream().synchronize()

    def receive(self, tensor: Tensor, timeout_s: float) -> None:
        self._group.recv([tensor], self._other, 0).wait(timedelta(seconds=timeout_s))
        torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        del self._group


def _store(timeout: timedelta) -> dist.TCPStore:
    """Where the two ends of a pair find each other. Left to itself it listens on every interface."""
    line = socket.create_server((_LOOPBACK, 0))
    port = line.getsockname()[1]
    return dist.TCPStore(
        _LOOPBACK, port, is_master=True, wait_for_workers=False, timeout=timeout, use_libuv=False,
        master_listen_fd=line.detach(),
    )  # fmt: skip


#: By name: from (the pair's connection, rank, seconds to open) to a path. The sender is rank 0.
PIPES: dict[str, Callable[[Connection, int, float], Pipe]] = {"wire": _WirePipe, "nccl": _NcclPipe}


def check_pipe(name: str, hosts: Sequence[str] = ()) -> None:
    """:param hosts: of the workers that it is to join

    :raises SlalomError: no such pipe, what it needs is not here, or it would be open to whoever reaches the hosts
    """
    if name not in PIPES:
        raise SlalomError("--kv-transport", name, f"use one of {', '.join(PIPES)}")
    if name != "nccl":
        return
    if any(not _is_loopback(host) for host in hosts):
        raise SlalomError("--kv-transport", name, "NCCL asks for no key: use wire, or workers on 127.0.0.1")
    if not (dist.is_nccl_available() and torch.cuda.is_available()):
        raise SlalomError("--kv-transport", name, "this machine has no GPU with NCCL; use wire")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _gather(pool: KVPool, blocks: Sequence[int]) -> Tensor:
    """``blocks`` of every layer, contiguous [layers, 2, n, block tokens, heads, head dim]."""
    index = torch.tensor(blocks, dtype=torch.int64, device=pool.layers[0].device)
    return torch.stack([layer.index_select(1, index) for layer in pool.layers])


def _scatter(pool: KVPool, blocks: Sequence[int], parts: Tensor) -> None:
    index = torch.tensor(blocks, dtype=torch.int64, device=pool.layers[0].device)
    for layer, part in zip(pool.layers, parts, strict=True):
        layer.index_copy_(1, index, part)
    if parts.is_cuda:  # the next step may read them on another stream
        torch.cuda.current_stream().synchronize()


class _Pair:
    """The receiver's end of one pair."""

    def __init__(self, sender: tuple[str, int], epoch: str, pipe: str, timeout_s: float) -> None:
        self._connection = connect(sender)
        try:
            opening = {"do": "serve_pulls", "epoch": epoch, "pipe": pipe, "timeout_s": timeout_s}
            ask(self._connection, opening, timeout_s)
            self._pipe = PIPES[pipe](self._connection, 1, timeout_s)
        except BaseException:
            self._connection.close()
            raise

    def fetch(self, source: int, pool: KVPool, blocks: Sequence[tuple[int, int]], until: float) -> None:
        theirs, ours = zip(*blocks, strict=True)
        send(self._connection, {"pool": source, "blocks": theirs, "timeout_s": max(until - time.monotonic(), 0.001)})
        for k in range(0, len(ours), _CHUNK):
            chunk = ours[k : k + _CHUNK]
            first = pool.layers[0]
            parts = first.new_empty((len(pool.layers), 2, len(chunk), *first.shape[2:]))
            self._pipe.receive(parts, max(until - time.monotonic(), 0.001))
            if time.monotonic() > until:  # this process was asleep: the blocks may be somebody else's by now
                raise TimeoutError("too late")
            _scatter(pool, chunk, parts)

    def close(self) -> None:
        self._pipe.close()
        self._connection.close()


class Puller:
    """Pulls KV into the pools of this process, one transfer at a time (that of one link).

    :param pipe: a name of :data:`PIPES`
    """

    def __init__(self, pipe: str) -> None:
        self._pipe = pipe
        self._pairs: dict[tuple[tuple[str, int], str], _Pair] = {}

    def fetch(
        self, sender: tuple[str, int], epoch: str, source: int, pool: KVPool, blocks: Sequence[tuple[int, int]],
        timeout_s: float,
    ) -> None:  # fmt: skip
        """Copy pairs of (block of the sender's pool ``source``, block of ``pool``). Nothing is written afterwards.

        :param epoch: by which the sender knows its owner
        :raises Exception: not everything came in ``timeout_s`` seconds, or the sender is gone
        """
        if not blocks:
            return
        until, peer = time.monotonic() + timeout_s, (sender, epoch)
        try:
            if peer not in self._pairs:
                self._pairs[peer] = _Pair(sender, epoch, self._pipe, timeout_s)
            self._pairs[peer].fetch(source, pool, blocks, until)
        except BaseException:
            if peer in self._pairs:
                self._pairs.pop(peer).close()
            raise

    def close(self) -> None:
        """Break every pair."""
        while self._pairs:
            self._pairs.popitem()[1].close()


def serve_pulls(connection: Connection, opening: dict[str, Any], pools: dict[int, KVPool]) -> None:
    """The sender's end of one pair, until the receiver hangs up: answers each question with the blocks it names.

    :param opening: the receiver's first message
    """
    make = PIPES[opening["pipe"]]
    send(connection, {})
    path = make(connection, 0, opening["timeout_s"])
    try:
        while True:
            wanted = receive(connection)
            until = time.monotonic() + wanted["timeout_s"]
            for k in range(0, len(wanted["blocks"]), _CHUNK):
                parts = _gather(pools[wanted["pool"]], wanted["blocks"][k : k + _CHUNK])
                path.send(parts, max(until - time.monotonic(), 0.001))
    finally:
        path.close()
