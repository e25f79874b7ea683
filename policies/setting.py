"""What a policy may know of a scenario before the first request arrives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engine.core.columns import Kind
from engine.core.kinds import Role
from engine.core.policy import InstancePlan
from engine.core.state import ClusterState
from engine.errors import SlalomError
from engine.latency.evaluate import TICKS_PER_S


class SloTarget(NamedTuple):
    """One SLO class: its weight and targets. ``ttft_factor`` 0 means the fixed ``ttft_s``, else the target is
    ``ttft_factor`` × isolated prefill time (at least ``ttft_s``)."""

    weight: float
    ttft_s: float
    ttft_factor: float
    tpot_s: float


@dataclass(frozen=True, eq=False)
class Setting:
    """The scenario as a rule sees it at start. Per-instance tuples have ``n_instances`` entries.

    :param gpus: distinct GPUs the instances stand on
    :param roles: :class:`engine.core.kinds.Role` of each instance, as the scenario starts it
    :param chunk_tokens: token budget of a fused step or prefill chunk
    :param batching: :class:`engine.core.kinds.Batching`
    :param max_batch: running sequences
    :param kv_tokens: KV capacity of the instance's pool, tokens
    :param profile_of: row of ``profile`` the instance runs on
    :param profile: ``engine.latency.evaluate.PROFILE`` (n,)
    :param share: ``engine.latency.evaluate.SHARE`` (n, M), last row in use = whole device
    :param usable_roles: what a policy may arrange instances as before it starts
    :param kinds: decision kinds the core will ask for
    :param control_s: control interval, seconds
    :param mean_prompt: mean prompt tokens if known, else 0
    :param mean_output: mean output tokens if known, else 0
    """

    n_instances: int
    gpus: int
    roles: tuple[int, ...]
    chunk_tokens: tuple[int, ...]
    batching: tuple[int, ...]
    max_batch: tuple[int, ...]
    kv_tokens: tuple[int, ...]
    profile_of: tuple[int, ...]
    profile: np.ndarray
    share: np.ndarray
    classes: tuple[SloTarget, ...]
    usable_roles: frozenset[int] = frozenset(Role)
    kinds: frozenset[Kind] = frozenset({Kind.PLACE_PREFILL, Kind.PLACE_DECODE})
    allow_hold: bool = True
    allow_shed: bool = False
    control_s: float = 1.0
    mean_prompt: float = 0.0
    mean_output: float = 0.0

    @property
    def is_uniform(self) -> bool:
        """Whether all instances are of one hardware: then it does not matter which of them does what."""
        return len(set(zip(self.profile_of, self.kv_tokens, self.max_batch, strict=True))) == 1

    def check_roles(self, plans: Sequence[InstancePlan], who: str) -> None:
        """:raises SlalomError: a plan uses a role that this scenario does not allow"""
        for plan in plans:
            if plan.role is not None and plan.role not in self.usable_roles:
                known = ", ".join(Role(role).name.lower() for role in sorted(self.usable_roles))
                fix = f"the scenario allows {known}; add it to decisions.start_roles, or arrange instances otherwise"
                raise SlalomError(f"{who}: role", Role(plan.role).name.lower(), fix)

    @classmethod
    def of_state(cls, state: ClusterState, mean_prompt: float = 0.0, mean_output: float = 0.0) -> Setting:
        """The setting of a cluster in its start state."""
        cluster, inst = state.cluster[0], state.inst

        def column(name: str) -> tuple[int, ...]:
            return tuple(int(v) for v in inst[name])

        kinds = {Kind.PLACE_PREFILL, Kind.PLACE_DECODE}
        if cluster["ask_realloc"]:
            kinds.add(Kind.REALLOCATE)
        if cluster["ask_tune"]:
            kinds.add(Kind.TUNE)
        tokens = state.pool["n_blocks"][inst["pool"]].astype(np.int64) * int(cluster["block_tokens"])
        return cls(
            n_instances=len(inst),
            gpus=len(set(column("gpu"))),
            roles=column("role"),
            chunk_tokens=column("chunk_tokens"),
            batching=column("batching"),
            max_batch=column("max_batch"),
            kv_tokens=tuple(int(v) for v in tokens),
            profile_of=column("profile"),
            profile=state.profile,
            share=state.share,
            classes=tuple(
                SloTarget(float(c["weight"]), float(c["ttft_s"]), float(c["ttft_factor"]), float(c["tpot_s"]))
                for c in state.cls
            ),
            kinds=frozenset(kinds),
            allow_hold=bool(cluster["allow_hold"]),
            allow_shed=bool(cluster["allow_shed"]),
            control_s=float(cluster["control_ticks"]) / TICKS_PER_S,
            mean_prompt=mean_prompt,
            mean_output=mean_output,
        )
