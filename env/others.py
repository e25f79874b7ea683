"""Engines of others in a scenario (``engine: vllm``, ``engine: llama_cpp``): what a router in front of them can decide.

Nothing here is a mechanism of its own. Fields that a scenario leaves out get what such a deployment has, and fields
that ask for more are refused, so that whoever learns on the scenario has the levers of ``route`` and no others: place,
hold, order and refuse; with vLLM also who decodes and what each engine is used for, where KV can be handed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from env.sections import Decisions, InstanceGroup

EngineName = Literal["own", "vllm", "llama_cpp"]

#: Prompt tokens of a step where neither the scenario nor the engine's command line says (``max_num_batched_tokens``,
#: ``--batch-size``), as ``route`` takes it to be.
_CHUNK_TOKENS = 2048
#: Every token passes through the router, which books it so much later at most (``engine.remote.reports``).
_BOOKED_AFTER_S = 0.005


class Misfit(NamedTuple):
    """A field that asks for what the engines cannot do: its dotted path, its value, the remedy."""

    field: str
    value: Any
    fix: str


def filled_in(content: Any) -> Any:
    """``content`` of a scenario as it was parsed, with what its engine implies where it says nothing."""
    if not isinstance(content, dict) or content.get("engine", "own") == "own":
        return content
    found: dict[str, Any] = {"observation_delay_s": _BOOKED_AFTER_S} | content
    found["decisions"] = _with(content.get("decisions", {}), hold=True)
    groups = content.get("cluster")
    if isinstance(groups, list | tuple):
        found["cluster"] = [_with(group, chunk_tokens=_CHUNK_TOKENS) for group in groups]
    return found


def _with(section: Any, **defaults: Any) -> Any:
    return defaults | section if isinstance(section, dict) else section


def roles_of(engine: EngineName, decisions: Decisions) -> tuple[str, ...]:
    """What the instances of ``engine`` may be used for."""
    return ("prefill", "decode", "mixed") if engine == "vllm" and decisions.place_decode else ("mixed",)


def batching_of(engine: EngineName) -> dict[str, Any]:
    """Fields of :class:`engine.core.setup.InstanceSpec` by which the engine admits prompts and takes sequences back.

    vLLM's are the defaults of its ``SchedulerConfig`` (0.32): no watermark, a prompt starts when all of it has room,
    and none in a step that preempted. A slot of llama.cpp has a context of its own, so that nothing is ever kept back.
    """
    if engine == "own":
        return {}
    return {"watermark": 0.0, "whole_prompt": True, "pause_preempt": engine == "vllm"}


def misfits(engine: EngineName, cluster: Sequence[InstanceGroup], decisions: Decisions) -> Iterator[Misfit]:
    """What ``cluster`` and ``decisions`` ask for and a router in front of ``engine`` cannot have."""
    roles = roles_of(engine, decisions)
    apart = "use " + ", ".join(roles) + (", or add place_decode" if engine == "vllm" and len(roles) == 1 else "")
    for i, group in enumerate(cluster):
        where = f"cluster.{i}"
        if group.role not in roles:
            yield Misfit(f"{where}.role", group.role, f"{engine} is not divided from outside: {apart}")
        if group.share_gpu:
            yield Misfit(f"{where}.share_gpu", True, f"every {engine} has KV of its own: leave it out")
        if group.batching_used != "chunked":
            fix = f"{engine} forms its batches itself, prompts in chunks beside decodes: leave it out"
            yield Misfit(f"{where}.batching", group.batching_used, fix)
        if group.order == "srf_preemptive":
            fix = "prompts that an engine has are not taken back for others: use fcfs, srf or on_time"
            yield Misfit(f"{where}.order", group.order, fix)
    yield from _lever_misfits(engine, decisions, roles)


def _lever_misfits(engine: EngineName, decisions: Decisions, roles: Sequence[str]) -> Iterator[Misfit]:
    if decisions.place_decode and engine == "llama_cpp":
        yield Misfit("decisions.place_decode", True, "llama.cpp hands no KV over: leave it out")
    if decisions.reallocate and len(roles) == 1:
        fix = "leave it out" if engine == "llama_cpp" else "add place_decode: roles need engines that hand KV over"
        yield Misfit("decisions.reallocate", True, f"every {engine} prefills and decodes: {fix}")
    if decisions.drain == "hand_over":
        yield Misfit("decisions.drain", decisions.drain, f"no answer that {engine} gives can be moved: use wait")
    if decisions.tune:
        fix = f"splits and chunk budgets of {engine} are set when it starts: leave it out"
        yield Misfit("decisions.tune", True, fix)
    for name in ("roles", "start_roles"):
        for role in getattr(decisions, name):
            if role not in roles and len(roles) > 1:
                yield Misfit(f"decisions.{name}", role, f"{engine} is not divided from outside: {', '.join(roles)}")
