"""The engine as a whole: a model on its instances, behind a door that any thread may use."""

from __future__ import annotations

import logging
import math
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from engine.core.events import interrupt
from engine.core.kinds import Batching, Role
from engine.core.policy import Policy
from engine.core.setup import ClusterOptions, InstanceSpec, LinkSpec, SloClass, new_cluster
from engine.core.state import ClusterState
from engine.errors import PromptTooLong, SlalomError
from engine.latency.evaluate import to_ticks
from engine.live.clock import WallClock
from engine.live.door import Door, Overloaded, TurnedAway, Unavailable
from engine.live.fate import DRAINING, OVERLOADED, UNAVAILABLE
from engine.live.guard import Guard
from engine.live.hosts import Host, local_hosts
from engine.live.instances import LiveInstances
from engine.live.integrity import faults
from engine.live.request import ABORT, ERROR, Delta, Request
from engine.live.runtime import Runtime
from engine.live.transfer import CopyTransport, Transport
from engine.model.forms import Progress
from engine.model.llama import Llama
from engine.model.sampling import SamplingParams
from engine.model.tokenizer import Tokenizer
from engine.model.weights import Checkpoint

__all__ = ["Engine", "Overloaded", "Unavailable", "build_state"]

_log = logging.getLogger("slalom.engine")
T = TypeVar("T")


def build_state(
    specs: Sequence[InstanceSpec],
    profile: np.ndarray,
    share: np.ndarray,
    *,
    classes: Sequence[SloClass],
    options: ClusterOptions | None = None,
    links: Sequence[LinkSpec] = (LinkSpec(),),
    max_requests: int = 1024,
    prefix_cache: bool = True,
) -> ClusterState:
    """The cluster of a live engine: ``max_requests`` slots, each with room for the hashes of its blocks.

    :raises SlalomError: as :func:`engine.core.setup.new_cluster`
    """
    options = options or ClusterOptions()
    size = options.block_tokens
    options = replace(options, hash_tokens=size if prefix_cache else 0)
    room = max(spec.kv_tokens for spec in specs) // size + 1
    return new_cluster(
        specs,
        profile,
        share,
        classes=classes,
        options=options,
        links=links,
        n_requests=max_requests,
        hashes=np.zeros(max_requests * room, np.uint64) if prefix_cache else None,
    )


class Engine:
    """Serves requests until :meth:`close`. Every method may be called from any thread.

    :param model: the weights; where ``hosts`` are given its description will do
    :param state: an idle cluster, see :func:`build_state`
    :param policy: answers its decisions
    :param hosts: where the instances run, one for each; in this process if not given
    :param transport: moves KV between the pools of those hosts
    :param max_tokens: tokens of the longest request, prompt and answer (at most what model and pools hold)
    :param transfer_timeout_s: a KV transfer may take in each of its states
    :param guard: stands between scheduler and policy, and already has ``policy``
    :param eager: launch every kernel from the host, also where a GPU could replay graphs
    :raises SlalomError: the cluster asks for what this device or model cannot do
    """

    def __init__(
        self,
        model: Llama | Checkpoint,
        tokenizer: Tokenizer,
        state: ClusterState,
        policy: Policy,
        *,
        max_tokens: int | None = None,
        hosts: Sequence[Host] | None = None,
        transport: Transport | None = None,
        transfer_timeout_s: float = 10.0,
        guard: Guard | None = None,
        eager: bool = False,
    ) -> None:
        _check_layers(model, state)
        self.tokenizer, self.state, self.clock = tokenizer, state, WallClock()
        config = model.config
        room = min(int(p["n_blocks"]) for p in state.pool) * int(state.cluster[0]["block_tokens"]) - 1
        self.max_tokens = min(room, config.max_tokens, max_tokens or room)
        self.vocab_size = config.vocab
        if hosts is None:
            assert isinstance(model, Llama), "without hosts the weights are needed here"
            hosts = local_hosts(model, state, tokenizer.eos_ids, self.max_tokens, eager=eager)
        self._hosts = hosts
        self.instances = LiveInstances(
            state,
            self.clock,
            self._hosts,
            transport or CopyTransport(),
            salt=secrets.randbits(63),
            timeout_s=transfer_timeout_s,
        )
        self.runtime = Runtime(state, policy, self.instances, self.clock, guard)
        self.instances.attach(self.runtime)
        self._open = Door()
        self.instances.on_gone = self._open.one_less
        self._accepting = True
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="scheduler", daemon=True)

    # -- life ------------------------------------------------------------------------------------------------

    def start(self) -> Engine:
        """Begin to serve."""
        self._thread.start()
        return self

    @property
    def accepting(self) -> bool:
        """Whether a new request would be taken."""
        return self._accepting and not self.is_dead

    @property
    def is_dead(self) -> bool:
        """Whether it will never take a request again, however long one waits."""
        return self.failure is not None or len(self.instances.lost) >= len(self.state.inst)

    @property
    def n_open(self) -> int:
        """Requests handed in and not yet ended."""
        return self._open.n

    def drain(self) -> None:
        """Take no new request; those that are here go on."""
        with self._open.lock:
            self._accepting = False

    def undrain(self) -> None:
        """Take requests again after :meth:`drain`."""
        self._accepting = True

    def close(self, timeout_s: float = 30.0) -> bool:
        """Shut down, in this order:

        1. no new request is taken;
        2. those that are here get ``timeout_s`` seconds to end, then they are aborted;
        3. the scheduler's loop ends, once no lane and no link is busy;
        4. the lanes' threads end, then the links';
        5. SM partitions are given back.

        :return: False when a thread hangs (it is a daemon, so the process can still exit)
        """
        self.drain()
        self._open.wait_for_none(timeout_s)

        def last_call() -> None:
            self.instances.doom_all(ABORT)
            self.instances.closing = True

        if self._thread.is_alive():
            self.clock.post(self.runtime.slots.arrival, last_call)
            self._thread.join(min(5.0 + timeout_s, threading.TIMEOUT_MAX))
        ended = self.instances.stop() and not self._thread.is_alive()
        if ended:
            for host in self._hosts:
                host.close()
            if self.runtime.guard is not None:
                self.runtime.guard.close()
        return ended

    def _serve(self) -> None:
        try:
            self.runtime.run()
        except BaseException as error:  # a fault of ours: nobody may wait for ever
            self.failure = error
            _log.critical("the scheduler stopped", exc_info=error)
            for request in self.instances.requests:
                if request is not None:
                    self.instances.heard(request, Delta(None, "", ERROR))
            self.instances.after_step()
            self._open.forget()

    # -- requests ----------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        sink: Callable[[Delta], None],
        *,
        cls: int = 0,
        ttft_s: float | None = None,
        tpot_s: float | None = None,
        priority: int = 0,
        form: Progress | None = None,
    ) -> Request:
        """Hand in a request. ``sink`` hears of every token and of the end, in the scheduler's thread.

        :param ttft_s: own target, that of the class if not given; ``tpot_s`` likewise
        :param priority: on each instance prompts of a lower value start first (as vLLM); no running one is stopped
        :param form: the beginning of an answer of a prescribed form (:class:`engine.model.forms.Forms`)
        :raises SlalomError: a prompt that is empty, too long or not of this vocabulary; no such stop token; a bad
            class, target or priority
        :raises Overloaded: all slots are taken
        :raises Unavailable: draining, closed or broken
        """
        if not prompt:
            raise SlalomError("prompt", [], "give at least one token")
        tokens = list(prompt)
        if len(tokens) >= self.max_tokens:
            raise PromptTooLong("prompt", f"{len(tokens)} tokens", self.max_tokens)
        if not all(0 <= token < self.vocab_size for token in tokens):
            raise SlalomError("prompt", "unknown token id", f"ids go from 0 to {self.vocab_size - 1}")
        self._check_ends(params)
        if not 0 <= cls < len(self.state.cls):
            raise SlalomError("class", cls, f"classes go from 0 to {len(self.state.cls) - 1}")
        if abs(priority) >= 2**31:
            raise SlalomError("priority", priority, "give a number of at most 31 bits")
        room = min(params.max_tokens, self.max_tokens - len(tokens))
        params = replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))
        request = Request(
            tokens,
            params,
            self.tokenizer,
            sink,
            cls=cls,
            ttft_slo=_target("ttft", ttft_s),
            tpot_slo=_target("tpot", tpot_s),
            priority=priority,
            form=form,
        )
        with self._open.lock:
            self._admit(request)
            self._open.n += 1
            request.handed_in = self.clock.stamp()
            # Posted under the lock: after drain() nothing follows, so close() speaks the last word.
            self.clock.post(self.runtime.slots.arrival, partial(self.instances.admit, request))
        return request

    def _admit(self, request: Request) -> None:
        """Raise where ``request`` is not taken, and have it booked. Under the door's lock."""
        if self.accepting and self._open.n < len(self.state.req):
            return
        reason = OVERLOADED if self.accepting else UNAVAILABLE if self.is_dead else DRAINING
        away = TurnedAway(request.number, request.cls, reason)
        if not self._thread.is_alive():  # nobody else books anything any more
            self.instances.on_refused(away)
        else:
            self._open.refused.append(away)
            if len(self._open.refused) == 1:  # one event for all that are turned away until it is handled
                self.clock.post(self.runtime.slots.arrival, self._book_refused)
        if reason == OVERLOADED:
            raise Overloaded(f"{self._open.n} requests are open")
        raise Unavailable(self._why_not())

    def _book_refused(self) -> None:
        for request in self._open.take_refused():
            self.instances.on_refused(request)

    def _check_ends(self, params: SamplingParams) -> None:
        """:raises SlalomError: no such token to stop at or to favour, or stop tokens that leave nothing to choose"""
        ends = set(params.stop_token_ids)
        biased = [token for token, _ in params.logit_bias]
        for name, tokens in (("stop_token_ids", ends), ("logit_bias", biased)):
            for token in tokens:
                if not 0 <= token < self.vocab_size:
                    raise SlalomError(name, token, f"ids go from 0 to {self.vocab_size - 1}")
        if params.min_tokens > 0 and len(ends | self.tokenizer.eos_ids) >= self.vocab_size:
            fix = "with min_tokens some token must be left that ends nothing"
            raise SlalomError("stop_token_ids", f"{len(ends)} tokens", fix)

    def _why_not(self) -> str:
        if self.failure is not None:
            return "the engine failed"
        return "every instance is lost" if self._accepting else "the engine is shutting down"

    def abort(self, request: Request) -> None:
        """The caller is gone; the request's blocks are free at once, or when the step in flight has ended."""
        self.clock.post(self.runtime.slots.arrival, partial(self.instances.doom, request, ABORT))

    def abort_all(self) -> None:
        """Nobody waits any longer: every open request ends now."""
        self.clock.post(self.runtime.slots.arrival, partial(self.instances.doom_all, ABORT))

    # -- administration ------------------------------------------------------------------------------------------

    def call(self, function: Callable[[], T], timeout_s: float = 10.0) -> T:
        """Run ``function`` in the scheduler's thread, where the state is at rest, and return what it returns.

        :raises Unavailable: the scheduler does not run, or did not answer in time
        """
        if not self._thread.is_alive():
            raise Unavailable("the engine is not running")
        future: Future[T] = Future()

        def carry_out() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self.clock.post(self.runtime.slots.arrival, carry_out)
        try:
            return future.result(timeout_s)
        except TimeoutError as error:
            raise Unavailable("the engine did not answer in time") from error

    def set_policy(self, policy: Any) -> None:
        """Let ``policy`` decide from now on, or what a guard has prepared of it."""
        self.call(lambda: self.runtime.set_policy(policy))

    def set_role(self, instance: int, role: Role) -> None:
        """Drain ``instance`` and give it ``role``; returns once the change has begun.

        :raises SlalomError: no such instance, a change under way, or too few instances left for a phase
        """
        if not 0 <= instance < len(self.state.inst):
            raise SlalomError("instance", instance, f"instances go from 0 to {len(self.state.inst) - 1}")
        if not self.call(lambda: bool(interrupt.request_role(self.runtime.words, instance, int(role)))):
            fix = "wait for the change under way, and leave enough instances to prefill and to decode"
            raise SlalomError("role", role.name.lower(), fix)

    def integrity_faults(self) -> list[str]:
        """What is wrong with the books of an idle engine; empty when all is well, or something is being served."""

        def check() -> list[str]:
            return faults(self.state)

        return self.call(check) if self._thread.is_alive() else check()

    def generate(self, prompt: Sequence[int], params: SamplingParams, **options: Any) -> list[int]:
        """Serve one request and wait for its tokens. ``options`` as :meth:`submit`."""
        tokens: list[int] = []
        done = threading.Event()

        def sink(delta: Delta) -> None:
            if delta.token is not None:
                tokens.append(delta.token)
            if delta.finish is not None:
                done.set()

        self.submit(prompt, params, sink, **options)
        done.wait()
        return tokens


def _target(name: str, seconds: float | None) -> int:
    """A target in ticks, 0 when there is none."""
    if seconds is None:
        return 0
    if not (math.isfinite(seconds) and 0.0 < seconds <= 86400.0):
        raise SlalomError(f"{name} target", seconds, "give a positive number of seconds, at most a day")
    return max(int(to_ticks(seconds)), 1)  # 0 would mean that of the class


def _check_layers(model: Llama | Checkpoint, state: ClusterState) -> None:
    """Slices of layers need a profile of this very model."""
    layers = model.config.n_layers
    for k, instance in enumerate(state.inst):
        found = int(state.profile[instance["profile"]]["n_layers"])
        layered = instance["role"] == Role.MULTIPLEXED and instance["batching"] == Batching.LAYERED
        if layered and found != layers:
            fix = f"the model has {layers} layers; slices need a profile of this model"
            raise SlalomError(f"instances[{k}].profile", f"{found} layers", fix)
