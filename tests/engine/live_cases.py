"""Engines on the tiny random model, and callers that write down what they hear."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from runtime_cases import tables

from engine.core.kinds import Role
from engine.core.setup import ClusterOptions, InstanceSpec, LinkSpec, SloClass
from engine.live.engine import Engine, build_state
from engine.live.fate import Fate
from engine.live.observer import Observer
from engine.live.request import Delta, Request, Ticket
from engine.model import SamplingParams, load_model, load_tokenizer
from policies.load import load_policy
from policies.setting import Setting

torch.set_num_threads(1)
MODEL, TOKENIZER = load_model("dummy:tiny"), load_tokenizer("dummy:tiny")
KV = 2048
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
PROMPTS = [
    torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 7, 16, 33, 70, 200)
]


class Caller:
    """Hears of one request."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.done = threading.Event()
        self.request: Request | None = None

    def __call__(self, delta: Delta) -> None:
        self.deltas.append(delta)
        if delta.finish is not None:
            self.done.set()

    @property
    def tokens(self) -> list[int]:
        return [d.token for d in self.deltas if d.token is not None]

    @property
    def text(self) -> str:
        return "".join(d.text for d in self.deltas)

    @property
    def finish(self) -> str | None:
        return self.deltas[-1].finish if self.deltas else None

    def wait(self) -> Caller:
        assert self.done.wait(240), "the request did not end"  # the first one may wait for the compiler
        return self


class Ends(Observer):
    """Calls ``heard`` with each request that ended, its record and why."""

    def __init__(self, heard: Callable[[Ticket, np.void, str], Any]) -> None:
        self._heard = heard

    def request_ended(self, request: Ticket, record: np.void, finish: str, fate: Fate) -> None:
        self._heard(request, record, finish)


class FirstAllowed:
    """Takes the first allowed candidate: prompts go to instance 0, and from a PREFILL instance to the next."""

    name, needs, arrangement = "first_allowed", 1, None
    params, memory = np.zeros(1), np.zeros(1)

    def decide(self, context: Any, candidates: Any, mask: Any, params: Any, memory: Any) -> int:
        return int(np.flatnonzero(mask)[0])

    def describe(self) -> dict[str, Any]:
        return {}


def send(engine: Engine, prompt: Sequence[int], params: SamplingParams = GREEDY, **options: Any) -> Caller:
    caller = Caller()
    caller.request = engine.submit(prompt, params, caller, **options)
    return caller


def cores(n: int, layers: int = 4) -> Callable[[], Any]:
    """Tables of a device with ``n`` cores: decode may have any number of them beside prefill."""

    def made() -> Any:
        profile, share = tables(shares=n, layers=layers)
        profile["total_sms"], share["sms"] = n, np.arange(1, n + 1)
        return profile, share

    return made


def mixed(n: int = 1, **changes: Any) -> list[InstanceSpec]:
    return [InstanceSpec(**({"role": Role.MIXED, "pool": i, "kv_tokens": KV, "link": i} | changes)) for i in range(n)]


@contextmanager
def engine_on(
    specs: Sequence[InstanceSpec],
    *,
    rule: str = "least_tokens",
    policy: Any = None,
    options: ClusterOptions | None = None,
    max_requests: int = 32,
    prefix_cache: bool = True,
    tables_of: Callable[[], Any] = tables,
    model: Any = MODEL,
    tokenizer: Any = TOKENIZER,
    **more: Any,
) -> Iterator[Engine]:
    """A running engine, whose books must balance in the end."""
    profile, share = tables_of()
    state = build_state(
        specs,
        profile,
        share,
        classes=[SloClass(1.0, 0.1)],
        options=options,
        links=[LinkSpec() for _ in specs],
        max_requests=max_requests,
        prefix_cache=prefix_cache,
    )
    policy = policy or load_policy(rule, Setting.of_state(state))
    engine = Engine(model, tokenizer, state, policy, **more).start()
    try:
        yield engine
        assert engine.failure is None
    finally:
        closed = engine.close(timeout_s=20.0)
    assert closed
    assert engine.integrity_faults() == []
