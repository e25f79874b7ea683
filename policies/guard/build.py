"""A guard from names and files, as ``serve`` makes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from engine.core.policy import Policy
from engine.core.state import ClusterState
from engine.errors import SlalomError
from policies.guard.config import GuardConfig
from policies.guard.guard import Guard
from policies.guard.log.log import DecisionLog
from policies.guard.snapshot import is_ours
from policies.load import load_policy
from policies.setting import Setting


class GuardOptions(Protocol):
    """What ``serve`` and ``route`` let a user say about the guard."""

    @property
    def fallback(self) -> str: ...
    @property
    def deadline_us(self) -> float: ...
    @property
    def advisory(self) -> bool: ...
    @property
    def guard_config(self) -> str: ...
    @property
    def decision_log(self) -> str: ...


def build_guard(
    state: ClusterState,
    policy: Policy,
    file: str | Path | None = None,
    given: Mapping[str, Any] | None = None,
    log_path: str | Path | None = None,
    *,
    log: bool = True,
    classes: Sequence[str] = (),
) -> Guard:
    """The guard of ``policy`` on ``state``.

    :param file: a :class:`GuardConfig` as YAML or JSON; ``given`` wins over it where not None
    :param log_path: where the decision log goes, instead of what the file says; ``log`` False: nowhere
    :param classes: names of the SLO classes, for the log
    :raises SlalomError: see :meth:`GuardConfig.load` and :class:`Guard`; a fallback that is no rule of this package
    """
    config = GuardConfig.load(file, **(given or {}))
    name = config.fallback or getattr(policy, "fallback", None) or "least_tokens"
    fallback = load_policy(name, Setting.of_state(state))
    if not is_ours(fallback):
        raise SlalomError("fallback", name, "name a rule of this package: it is what must not fail")
    path, options = log_path or config.log.path, config.log
    if not log or path is None:
        return Guard(state, policy, fallback, config)
    decisions = DecisionLog(
        Path(path),
        max_bytes=int(options.max_mb * 1e6),
        keep=options.keep,
        features=options.features,
        ring_mb=options.ring_mb,
        writer=options.writer,
    )
    return Guard(state, policy, fallback, config, decisions, classes)
