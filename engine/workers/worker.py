"""``serve-worker``: a process that holds the weights and KV of some instances of a ``serve`` in another process.

It computes what it is told to and moves KV with its peers; all decisions are made in the process of ``serve``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from typing import Annotated, Any

import torch
import typer

from engine.calibration.quick import measure
from engine.common.options import command_app, run_command
from engine.lanes.partitions import Lanes, make_device
from engine.live.graphs import Capturer, CudaCapturer, LaneGraphs
from engine.live.hosts import GraphSizes, LocalExecutor, lane_graphs
from engine.model import KVPool, Llama, ModelRunner, load_model, load_tokenizer
from engine.model.device import choose_device, choose_dtype, where
from engine.workers.kv import Puller, serve_pulls
from engine.workers.lease import Disowned, Lease
from engine.workers.wire import admit, hang_up, listen, parse_address, receive, send, step_from

#: Callers that have not proved yet to know the secret; more are turned away.
_STRANGERS = 64
app = command_app()


class Worker:
    """Answers the questions of one ``serve`` and of its other workers, a thread for each connection.

    :param make: a capturer of graphs for each lane; None: every launch by the host
    """

    def __init__(self, model: Llama, eos_ids: frozenset[int], make: Callable[[], Capturer] | None = None) -> None:
        self._model, self._eos_ids, self._make = model, eos_ids, make
        weights = model.embed.weight
        self._device = make_device(weights.device.type, weights.device.index or 0)
        self._pools: dict[int, KVPool] = {}
        #: By instance and cuts: its two lanes, and those of a later owner, share partitions.
        self._lanes: dict[tuple[int, ...], Lanes] = {}
        self._cutting = threading.Lock()  # and capturing: a second capture in the process breaks the first
        self._lease = Lease()
        self._strangers = threading.Semaphore(_STRANGERS)
        self._talks: dict[threading.Thread, Connection] = {}

    def welcome(self, connection: Connection) -> None:
        """Talk with a caller in a thread of its own. One that does not prove to know the secret stays for seconds."""
        if not self._strangers.acquire(blocking=False):
            connection.close()
            return
        thread = threading.Thread(target=self._talk, args=(connection,), daemon=True)
        self._talks[thread] = connection
        thread.start()

    def close(self, timeout_s: float = 10.0) -> bool:
        """Hang up on everybody; nobody new may be welcomed. False when a thread did not end in time.

        Before the process ends: a thread that is in the middle of giving a pair back when the interpreter is gone ends
        the process with ``terminate called without an active exception``.
        """
        until, talks = time.monotonic() + timeout_s, list(self._talks.items())
        for _, connection in talks:
            hang_up(connection)
        for thread, _ in talks:
            thread.join(max(until - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread, _ in talks)

    def _talk(self, connection: Connection) -> None:
        try:
            self._admitted(connection)
        finally:
            del self._talks[threading.current_thread()]

    def _admitted(self, connection: Connection) -> None:
        try:
            admit(connection)
        except (EOFError, OSError, AuthenticationError):
            connection.close()
            return
        finally:
            self._strangers.release()
        self.converse(connection)

    def converse(self, connection: Connection) -> None:
        """Answer until the other side hangs up."""
        puller, lane = None, None
        owned: str | None = None  # the epoch of an owner that speaks here
        try:
            while True:
                message = receive(connection)
                do = message["do"]
                try:
                    if do == "own":
                        owned = self._lease.take()
                        send(connection, {"epoch": owned})
                        continue
                    self._lease.check(message.get("epoch"))
                except Disowned as error:
                    send(connection, {"disowned": str(error)})
                    continue
                if do == "serve_pulls":
                    serve_pulls(connection, message, self._pools)
                    return
                try:
                    if do == "fetch":
                        puller = puller or Puller(message["pipe"])
                        answer = self._fetch(puller, message)
                    elif do == "lane":
                        lane = self._lane(message)
                        answer = {"n_layers": lane.n_layers}
                    elif do == "step" and lane is not None:
                        tokens = lane.run(*step_from(message), message["partition"])
                        answer = {"tokens": tokens, "logprobs": lane.logprobs, "prompts": lane.prompt_logprobs}
                    else:
                        answer = self._administer(message)
                except Exception as error:  # told to whoever asked; the next question may be answered again
                    answer = {"error": f"{type(error).__name__}: {error}"}
                send(connection, answer)
        except (EOFError, OSError):
            return
        except Exception as error:  # no message, or a pair that broke: whoever sent it hears the line end
            said = str(error).partition("\n")[0][:200]
            print(f"serve-worker: hung up on a peer: {type(error).__name__}: {said}", file=sys.stderr, flush=True)
        finally:
            if lane is not None:
                lane.close()
            if self._lease.give_back(owned):
                self._pools = {}
            if puller is not None:
                puller.close()
            connection.close()

    def _administer(self, message: dict[str, Any]) -> dict[str, Any]:
        weights = self._model.embed.weight
        if message["do"] == "renew":
            return {}
        if message["do"] == "describe":
            config = self._model.config
            shape = {name: getattr(config, name) for name in ("vocab", "n_layers", "n_kv_heads", "head_dim", "width")}
            return shape | {"dtype": str(weights.dtype).removeprefix("torch."), "device": weights.device.type}
        if message["do"] == "measure":
            profile, share = measure(self._model, eager=self._make is None)
            return {"profile": profile.tobytes().hex(), "share": share.tobytes().hex(), "shares": share.shape[1]}
        if message["do"] == "pools":
            make = partial(KVPool, self._model.config, block_tokens=message["block_tokens"])
            self._pools = {
                int(p): make(blocks=n, dtype=weights.dtype, device=weights.device) for p, n in message["blocks"].items()
            }
            return {}
        raise ValueError(f"unknown message {message['do']!r}")

    def _lane(self, message: dict[str, Any]) -> LocalExecutor:
        runner = ModelRunner(self._model, self._pools[message["pool"]], eos_ids=self._eos_ids)
        l, cut = message["lane"], (message["instance"], *message["sizes"])
        with self._cutting:
            if cut not in self._lanes:
                self._lanes[cut] = Lanes(self._device, message["sizes"])
            lanes, graphs = self._lanes[cut], dict[int, LaneGraphs]()
            if self._model.embed.weight.is_cuda or self._make is not None:
                runner.warm(self._device.total)
            if self._make is not None:
                graphs.update(lane_graphs(runner, lanes, l, GraphSizes(*message["graphs"]), self._make()))
        return LocalExecutor(runner, lanes, l, graphs)

    def _fetch(self, puller: Puller, message: dict[str, Any]) -> dict[str, Any]:
        target, blocks = self._pools[message["to"]], [(a, b) for a, b in message["blocks"]]
        if message["sender"] is None:  # another pool of this process
            target.copy_from(self._pools[message["from"]], [a for a, _ in blocks], [b for _, b in blocks])
        else:
            host, port = message["sender"]
            epoch = message["sender_epoch"]
            puller.fetch((host, port), epoch, message["from"], target, blocks, message["timeout_s"])
        return {}


@app.command()
def work(
    model: Annotated[str, typer.Option(help="as for serve; the same file on every machine")],
    listen_on: Annotated[
        str, typer.Option("--listen", help="HOST:PORT by which serve and the other workers reach this process")
    ] = "127.0.0.1:0",
    device: Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda or cuda:N")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16 on CUDA, else float32), float32, bfloat16 or float16; as for serve")
    ] = "auto",
    kernels: Annotated[str, typer.Option(help="auto, torch, triton or flashinfer")] = "auto",
    eager: Annotated[bool, typer.Option("--eager", help="launch every kernel by itself, without CUDA graphs")] = False,
    once: Annotated[bool, typer.Option("--once", help="stop when standard input ends")] = False,
) -> None:
    """Hold weights and KV for a serve started with --workers HOST:PORT. Both need the same secret in SLALOM_KEY."""
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    print(f"serve-worker: {where(model, place, kind)}", file=sys.stderr, flush=True)
    torch.set_num_threads(1)
    address = parse_address(listen_on)
    listener = listen(address)
    eos_ids = load_tokenizer(model).eos_ids
    loaded = load_model(model, device=place, dtype=kind, kernels=kernels)
    index = loaded.embed.weight.device.index or 0
    make = partial(CudaCapturer, index) if place.startswith("cuda") and not eager else None
    worker = Worker(loaded, eos_ids, make)
    if once:
        threading.Thread(target=_end_with_input, daemon=True).start()
    print(json.dumps({"listening": listener.address}), flush=True)
    try:
        _welcome_all(listener, worker)
    finally:
        worker.close()


def _welcome_all(listener: Listener, worker: Worker) -> None:
    while True:
        try:
            connection = listener.accept()
        except OSError as error:  # out of descriptors, say: those who are here go on, new ones wait
            print(f"serve-worker: cannot accept a connection: {error}", file=sys.stderr, flush=True)
            time.sleep(1.0)
            continue
        worker.welcome(connection)


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """Entry point."""
    run_command("serve-worker", app)


if __name__ == "__main__":
    main()
