"""Modelled instances under load behind a guard, and policies that misbehave in every way."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engine.core.columns import Col, Ctx, Kind
from engine.core.kinds import RequestState, Role
from engine.core.setup import ClusterOptions, InstanceSpec, LinkSpec, SloClass, blank_requests, new_cluster
from engine.core.state import ClusterState
from engine.live.modelled import play
from engine.live.runtime import Runtime
from policies.guard import Guard
from policies.guard.config import GuardConfig
from policies.guard.log.log import DecisionLog
from policies.load import load_policy
from policies.setting import Setting

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))
from runtime_cases import tables

ROLES = (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)


def cluster(
    n_requests: int = 150, roles: tuple[Role, ...] = ROLES, *, rate: float = 120.0, **options: Any
) -> ClusterState:
    """A cluster with ``n_requests`` on their way at about its capacity."""
    profile, share = tables()
    specs = [InstanceSpec(role=role, pool=i, kv_tokens=4096, link=i) for i, role in enumerate(roles)]
    state = new_cluster(
        specs,
        profile,
        share,
        classes=[SloClass(0.2, 0.02)],
        options=ClusterOptions(**({"control_s": 0.05, "hold": True} | options)),
        links=[LinkSpec() for _ in specs],
        n_requests=n_requests,
    )
    rng = np.random.default_rng(7)
    req = blank_requests(n_requests)
    req["arrival"] = np.cumsum(rng.exponential(1e12 / rate, n_requests)).astype(np.int64)
    req["prompt"], req["output"] = rng.integers(8, 400, n_requests), rng.integers(1, 30, n_requests)
    return state._replace(req=req)


class Plain:
    """A policy of somebody else: plain Python, answers by ``answer(context, candidates, mask)``."""

    needs, arrangement = 7, None
    params, memory = np.zeros(1), np.zeros(1)

    def __init__(self, answer: Callable[..., Any], name: str = "plain") -> None:
        self._answer, self.name = answer, name
        self.asked = 0

    def decide(self, context: Any, candidates: Any, mask: Any, params: Any, memory: Any) -> Any:
        self.asked += 1
        return self._answer(context, candidates, mask)

    def describe(self) -> dict[str, Any]:
        return {"kind": "python"}


def first(context: Any, candidates: Any, mask: Any) -> int:
    return int(np.flatnonzero(mask)[0])


def guarded(
    policy: Any,
    state: ClusterState | None = None,
    *,
    log: DecisionLog | None = None,
    guard: Callable[[Guard], None] = lambda guard: None,
    **config: Any,
) -> tuple[Guard, Runtime]:
    """Serve all requests of ``state`` under ``policy``, a rule's name or an object. Nothing may be lost."""
    state = state or cluster()
    setting = Setting.of_state(state)
    policy = load_policy(policy, setting) if isinstance(policy, str) else policy
    made = Guard(state, policy, load_policy("least_tokens", setting), GuardConfig.load(**config), log)
    guard(made)
    runtime = play(state, made.policy, n_roots=len(state.req), guard=made)
    assert (state.req["state"] == RequestState.FINISHED).all(), "a request was lost"
    assert sum(made.reasons) == sum(runtime.decisions.values())
    assert runtime.fallbacks is made.fallbacks
    return made, runtime


def question(n: int = 4, kind: Kind = Kind.PLACE_PREFILL) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Context, candidates and mask of a placement on ``n`` instances."""
    context, candidates = np.zeros(len(Ctx)), np.zeros((n + 2, len(Col)))
    context[Ctx.KIND] = kind
    candidates[:n, Col.INSTANCE] = np.arange(n)
    candidates[:n, Col.ROLE] = Role.MIXED
    candidates[n:, Col.INSTANCE] = -1
    return context, candidates, np.array([1] * n + [0, 0], np.uint8)


def forever(context: Any, candidates: Any, mask: Any) -> int:
    threading.Event().wait()
    return 0
