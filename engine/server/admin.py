"""Administration, for clients on this machine only: look at the cluster, drain, change roles and policy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from fastapi import Depends, FastAPI
from pydantic import BaseModel, ConfigDict

from engine.core.kinds import Role
from engine.core.policy import Policy
from engine.errors import SlalomError
from engine.live.scheduler import Scheduler
from engine.server.keys import check_local
from engine.server.view import state_of

_log = logging.getLogger("slalom.admin")


class _RoleChange(BaseModel):
    model_config = ConfigDict(extra="forbid")
    instance: int
    role: str


class _PolicyChange(BaseModel):
    model_config = ConfigDict(extra="forbid")
    policy: str


class _ModeChange(BaseModel):
    model_config = ConfigDict(extra="forbid")
    mode: Literal["active", "advisory", "frozen"]
    restore: bool = False


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Log what an operator changes, and what is refused."""
    try:
        yield
    except Exception as error:
        _log.warning("%s: refused: %s", what, error)
        raise
    _log.info("%s", what)


def add_admin(app: FastAPI, engine: Scheduler, load_policy: Callable[[str], Policy] | None) -> None:
    """Add the routes under ``/admin``."""
    local = [Depends(check_local)]

    @app.get("/admin/state", dependencies=local)
    def state() -> dict[str, Any]:
        return engine.call(lambda: _describe(engine))

    @app.post("/admin/role", dependencies=local)
    def role(change: _RoleChange) -> dict[str, Any]:
        names = [r.name.lower() for r in Role]
        with _told(f"role of instance {change.instance} to {change.role}"):
            if change.role not in names:
                raise SlalomError("role", change.role, f"use one of {', '.join(names)}")
            engine.set_role(change.instance, Role[change.role.upper()])
        return engine.call(lambda: _describe(engine))

    @app.post("/admin/policy", dependencies=local)
    def policy(change: _PolicyChange) -> dict[str, Any]:
        with _told(f"policy {change.policy}"):
            if load_policy is None:
                raise SlalomError("policy", change.policy, "this server was started without a way to find policies")
            found, guard = load_policy(change.policy), engine.runtime.guard
            engine.set_policy(found if guard is None else guard.prepare(found, rehearse=True))
        return engine.call(lambda: _describe(engine))

    @app.post("/admin/mode", dependencies=local)
    def mode(change: _ModeChange) -> dict[str, Any]:
        """Frozen: at once the fallback places and nothing else changes; ``restore`` leads back to the start."""
        guard = engine.runtime.guard
        with _told(f"mode {change.mode}" + (", with restore" if change.restore else "")):
            if guard is None:
                raise SlalomError("mode", change.mode, "this server runs without a guard")
            if change.mode == "frozen":
                engine.call(lambda: guard.freeze(restore=change.restore))
            else:
                engine.call(lambda: guard.thaw(advisory=change.mode == "advisory"))
        return engine.call(lambda: _describe(engine))

    @app.post("/admin/drain", dependencies=local)
    def drain() -> dict[str, Any]:
        with _told("drain: no new request is taken"):
            engine.drain()
        return engine.call(lambda: _describe(engine))

    @app.post("/admin/undrain", dependencies=local)
    def undrain() -> dict[str, Any]:
        with _told("undrain: requests are taken again"):
            engine.undrain()
        return engine.call(lambda: _describe(engine))


def _guard(engine: Scheduler) -> dict[str, Any] | None:
    guard = engine.runtime.guard
    if guard is None:
        return None
    report = guard.report()
    names = ("mode", "generation", "fallback", "isolated", "deadline_us", "breaker", "breaker_trips", "reasons")
    drift = {d.metric: {"ratio": d.ratio if d.requests else None, "alarm": d.alarm} for d in report.drift}
    return {name: getattr(report, name) for name in names} | {"drift": drift}


def _describe(engine: Scheduler) -> dict[str, Any]:
    """The cluster as plain data. A role change shows as ``target_role`` until it is done and counts in ``switches``."""
    state = engine.state
    roles = [r.name.lower() for r in Role]
    return {
        "accepting": engine.accepting,
        "open_requests": engine.n_open,
        "policy": engine.runtime.policy.describe() | {"name": engine.runtime.policy.name},
        "decisions": dict(engine.runtime.decisions),
        "fallbacks": dict(engine.runtime.fallbacks),
        "guard": _guard(engine),
        "switches": int(state.cluster[0]["n_switches"]),
        "instances": [
            {
                "instance": i,
                "state": state_of(state, i),
                "role": roles[x["role"]],
                "target_role": None if x["target_role"] < 0 else roles[x["target_role"]],
                "running": int(x["run_n"]),
                "queued_tokens": int(x["queue_tokens"]),
                "free_blocks": int(state.pool[x["pool"]]["free"]),
                "blocks": int(state.pool[x["pool"]]["n_blocks"]),
                "steps": int(x["steps"]),
            }
            for i, x in enumerate(state.inst)
        ],
    }
