"""The engine as a whole: a model on its instances, behind a door that any thread may use."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from engine.core.kinds import Batching, Role
from engine.core.policy import Policy
from engine.core.setup import ClusterOptions, InstanceSpec, LinkSpec, SloClass, new_cluster
from engine.core.state import ClusterState
from engine.errors import PromptTooLong, SlalomError
from engine.live.clock import WallClock
from engine.live.guard import Guard
from engine.live.hosts import Host, local_hosts
from engine.live.instances import LiveInstances
from engine.live.request import Delta, Request
from engine.live.scheduler import Scheduler, target_ticks
from engine.live.transfer import CopyTransport, Transport
from engine.model.forms import Progress
from engine.model.llama import Llama
from engine.model.sampling import SamplingParams
from engine.model.tokenizer import Tokenizer
from engine.model.weights import Checkpoint


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


class Engine(Scheduler):
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

    instances: LiveInstances

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
        self.tokenizer, clock = tokenizer, WallClock()
        config = model.config
        room = min(int(p["n_blocks"]) for p in state.pool) * int(state.cluster[0]["block_tokens"]) - 1
        self.max_tokens = min(room, config.max_tokens, max_tokens or room)
        self.vocab_size = config.vocab
        if hosts is None:
            assert isinstance(model, Llama), "without hosts the weights are needed here"
            hosts = local_hosts(model, state, tokenizer.eos_ids, self.max_tokens, eager=eager)
        instances = LiveInstances(
            state,
            clock,
            hosts,
            transport or CopyTransport(),
            salt=secrets.randbits(63),
            timeout_s=transfer_timeout_s,
        )
        super().__init__(state, policy, instances, clock, guard)

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
            ttft_slo=target_ticks("ttft", ttft_s),
            tpot_slo=target_ticks("tpot", tpot_s),
            priority=priority,
            form=form,
        )
        self._hand_in(request)
        return request

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


def _check_layers(model: Llama | Checkpoint, state: ClusterState) -> None:
    """Slices of layers need a profile of this very model."""
    layers = model.config.n_layers
    for k, instance in enumerate(state.inst):
        found = int(state.profile[instance["profile"]]["n_layers"])
        layered = instance["role"] == Role.MULTIPLEXED and instance["batching"] == Batching.LAYERED
        if layered and found != layers:
            fix = f"the model has {layers} layers; slices need a profile of this model"
            raise SlalomError(f"instances[{k}].profile", f"{found} layers", fix)
