"""KV between processes: the receiver asks for blocks, the sender sends them, and a pair that broke is made anew.

Each link of a receiver keeps one connection to each sender, and with it one byte path (:class:`Pipe`) for two. They
are opened together and closed together on the first error, so a peer that died takes nothing but its own pair along,
and the next transfer starts with a fresh one. Every wait has an end.

Pipes: ``gloo`` (torch.distributed on CPU sockets, for any device, GPU tensors through host memory) and ``nccl``
(torch.distributed between GPUs). What touches a GPU here is not yet verified on GPU.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import SlalomError
from engine.model.kv import KVPool
from engine.workers.wire import ask, connect, receive, send

__all__ = ["PIPES", "Pipe", "Puller", "check_pipe", "serve_pulls"]

#: Blocks that travel together; also what is staged at both ends.
_CHUNK = 64


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


class _GroupPipe:
    """A torch.distributed process group of two; the sender is rank 0."""

    def __init__(self, backend: str, store: dist.Store, rank: int, host: str, timeout_s: float) -> None:
        self._other, self._on_host = 1 - rank, backend == "gloo"
        kind: Any = dist.ProcessGroupGloo if self._on_host else dist.ProcessGroupNCCL
        options = kind._Options() if self._on_host else kind.Options()
        options._timeout = timedelta(seconds=timeout_s)
        if self._on_host:
            options._devices = [kind.create_device(hostname=host)]
        else:
            # A timeout must end the waiting thread, not the process.
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        self._group = kind(store, rank, 2, options)

    def send(self, tensor: Tensor, timeout_s: float) -> None:
        staged = tensor.cpu() if self._on_host else tensor
        self._group.send([staged], self._other, 0).wait(timedelta(seconds=timeout_s))
        self._fence()

    def receive(self, tensor: Tensor, timeout_s: float) -> None:
        staged = torch.empty_like(tensor, device="cpu") if self._on_host and tensor.is_cuda else tensor
        self._group.recv([staged], self._other, 0).wait(timedelta(seconds=timeout_s))
        if staged is not tensor:
            tensor.copy_(staged)
        self._fence()

    def _fence(self) -> None:
        if not self._on_host:
            torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        del self._group


#: By name: from (store shared by the two, rank, own address, seconds to open) to a path. The sender is rank 0.
PIPES: dict[str, Callable[[dist.Store, int, str, float], Pipe]] = {
    "gloo": partial(_GroupPipe, "gloo"),
    "nccl": partial(_GroupPipe, "nccl"),
}


def check_pipe(name: str) -> None:
    """:raises SlalomError: no such pipe, or what it needs is not here"""
    if name not in PIPES:
        raise SlalomError("--kv-transport", name, f"use one of {', '.join(PIPES)}")
    if name == "nccl" and not (dist.is_nccl_available() and torch.cuda.is_available()):
        raise SlalomError("--kv-transport", name, "this machine has no GPU with NCCL; use gloo")


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

    def __init__(self, sender: tuple[str, int], epoch: str, pipe: str, host: str, timeout_s: float) -> None:
        name = uuid.uuid4().hex
        self._connection = connect(sender)
        try:
            opening = {"do": "serve_pulls", "epoch": epoch, "name": name, "pipe": pipe, "timeout_s": timeout_s}
            answer = ask(self._connection, opening, timeout_s)
            store = dist.TCPStore(sender[0], answer["store"], is_master=False, timeout=timedelta(seconds=timeout_s))
            self._pipe = PIPES[pipe](dist.PrefixStore(name, store), 1, host, timeout_s)
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

    :param host: address of this process for its peers
    """

    def __init__(self, pipe: str, host: str) -> None:
        self._pipe, self._host = pipe, host
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
                self._pairs[peer] = _Pair(sender, epoch, self._pipe, self._host, timeout_s)
            self._pairs[peer].fetch(source, pool, blocks, until)
        except BaseException:
            if peer in self._pairs:
                self._pairs.pop(peer).close()
            raise

    def close(self) -> None:
        """Break every pair."""
        while self._pairs:
            self._pairs.popitem()[1].close()


def serve_pulls(
    connection: Connection, opening: dict[str, Any], pools: dict[int, KVPool], store: dist.TCPStore, host: str
) -> None:
    """The sender's end of one pair, until the receiver hangs up: answers each question with the blocks it names.

    :param opening: the receiver's first message
    :param store: lives in this process, and the receiver's process connects to it to find the pair
    """
    send(connection, {"store": store.port})
    path = PIPES[opening["pipe"]](dist.PrefixStore(opening["name"], store), 0, host, opening["timeout_s"])
    try:
        while True:
            wanted = receive(connection)
            until = time.monotonic() + wanted["timeout_s"]
            for k in range(0, len(wanted["blocks"]), _CHUNK):
                parts = _gather(pools[wanted["pool"]], wanted["blocks"][k : k + _CHUNK])
                path.send(parts, max(until - time.monotonic(), 0.001))
    finally:
        path.close()
