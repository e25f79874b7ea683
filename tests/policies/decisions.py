"""Hand-made decisions and settings for the tests of policies."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engine.core.columns import N_CANDIDATE, N_CONTEXT, Col, Ctx, Kind
from engine.core.kinds import Batching, Role
from engine.latency.evaluate import PROFILE, SHARE
from policies.network.scoring import ScoringNetwork
from policies.rule import BoundPolicy, Setting, SloTarget
from policies.rules import linear_score

BASE = linear_score.weights(linear_score.RULE.values())


def setting(n: int = 4, **changes: Any) -> Setting:
    facts: dict[str, Any] = {
        "n_instances": n,
        "gpus": n,
        "roles": (int(Role.MIXED),) * n,
        "chunk_tokens": (512,) * n,
        "batching": (int(Batching.CHUNKED),) * n,
        "max_batch": (64,) * n,
        "kv_tokens": (100_000,) * n,
        "profile_of": (0,) * n,
        "profile": np.zeros(1, PROFILE),
        "share": np.zeros((1, 1), SHARE),
        "classes": (SloTarget(1.0, 1.0, 0.0, 0.1),),
    }
    return Setting(**(facts | changes))


def context(kind: Kind, **columns: float) -> np.ndarray:
    row = np.zeros(N_CONTEXT)
    row[int(kind)] = 1.0
    row[Ctx.KIND] = float(kind)
    row[Ctx.SOURCE] = -1.0
    for name, value in columns.items():
        row[Ctx[name]] = value
    return row


def instances(*rows: dict[str, float], last: Col | None = Col.IS_HOLD) -> np.ndarray:
    """One candidate per mapping of column names, numbered from 0, then (unless None) HOLD, SHED or KEEP."""
    table = np.zeros((len(rows) + (last is not None), N_CANDIDATE))
    for k, columns in enumerate(rows):
        role = int(columns.get("ROLE", Role.MIXED))
        table[k, Col.INSTANCE] = k
        table[k, Col.IS_INSTANCE] = 1.0
        table[k, Col.ROLE_PREFILL + role] = 1.0
        table[k, Col.ROLE] = role
        for name, value in columns.items():
            table[k, Col[name]] = value
    if last is not None:
        table[-1, last] = 1.0
        table[-1, Col.INSTANCE] = -1.0
    return table


def choose(policy: BoundPolicy, ctx: np.ndarray, rows: np.ndarray, *masked: int) -> int:
    mask = np.ones(len(rows), np.uint8)
    mask[list(masked)] = 0
    return int(policy.decide(ctx, rows, mask, policy.params, policy.memory))


def random_decision(rng: np.random.Generator, kind: Kind, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Plausible columns everywhere, also in those that a hand-made decision leaves at zero."""
    ctx = context(kind)
    ctx[4:20] = rng.exponential(0.7, 16)
    ctx[Ctx.SOURCE] = float(rng.integers(-1, rows))
    listed: list[dict[str, float]] = [{"ROLE": float(rng.integers(0, 4))} for _ in range(rows - 1)]
    control = kind in (Kind.REALLOCATE, Kind.TUNE)
    table = instances(*listed, last=Col.IS_KEEP if control else Col.IS_HOLD)
    table[:-1, Col.TTFT : Col.DRAINING] = rng.exponential(0.7, (rows - 1, Col.DRAINING - Col.TTFT))
    table[:-1, Col.SLACK : Col.SLACK_AFTER + 1] -= 0.7
    table[:-1, Col.QUEUE_TOKENS : Col.NEW_ROLE] = rng.exponential(100.0, (rows - 1, Col.NEW_ROLE - Col.QUEUE_TOKENS))
    return ctx, table[rng.permutation(rows)]


def network(hidden: int = 16, seed: int = 0) -> ScoringNetwork:
    """Random weights everywhere, as after training."""
    torch.manual_seed(seed)
    net = ScoringNetwork(BASE, hidden)
    with torch.no_grad():
        for parameter in (net.gate, net.out.weight, net.context.bias, net.pool.bias, net.value[2].bias):
            parameter.normal_(0.0, 0.5)
    return net
