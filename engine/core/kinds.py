"""What instances, lanes and requests can be: the enumerations that the record arrays of ``state`` hold as numbers."""

from __future__ import annotations

from enum import IntEnum


class Role(IntEnum):
    """What an instance does (DESIGN.md section 4)."""

    PREFILL = 0
    DECODE = 1
    MIXED = 2
    MULTIPLEXED = 3


class Batching(IntEnum):
    """How a MIXED instance forms steps, and how a MULTIPLEXED one slices its prefill."""

    CHUNKED = 0  # MIXED: prompt chunks ride on decode steps; MULTIPLEXED: prefill lane runs chunks
    PREFILL_FIRST = 1  # MIXED: whole prompts first, then decode (vLLM before chunked prefill)
    LAYERED = 2  # MULTIPLEXED: prefill lane runs groups of layers of whole prompts


class Split(IntEnum):
    """Who chooses the SMs of decode on a MULTIPLEXED instance; a split of 0 or more is a fixed share row."""

    AUTO = -1  # per step: the smallest share whose worst case keeps the target (MuxWise)
    TABLE = -2  # a table on the decode batch size, looked up when a prefill batch starts (SGLang pdmux)
    ON_DEMAND = -3  # fused steps on all SMs; two lanes only while a fused step would miss the target (DuetServe)


class Order(IntEnum):
    """In which order an instance prefills its queue; shortest remaining first among prompts not yet started, or at
    every chunk (a PREFILL instance then computes chunks; Tropical); or earliest TTFT deadline first, with those put
    last that keep the most others from theirs (``engine.core.schedule.on_time``)."""

    FCFS = 0
    SHORTEST = 1
    SHORTEST_PREEMPTIVE = 2
    ON_TIME = 3


class RequestState(IntEnum):
    """Where a request is. Every request ends in FINISHED, SHED or FAILED, exactly once."""

    NEW = 0  # not yet arrived
    PLACING = 1  # waits for a PLACE_PREFILL decision
    HELD = 2  # a policy answered HOLD
    WAITING = 3  # in an instance's prefill queue
    PREFILLING = 4  # part of a step in flight (still linked in the queue)
    HANDOVER = 5  # prefilled; waits for a PLACE_DECODE decision
    INBOUND = 6  # its decode instance has no room yet; blocks stay at the source
    MOVING = 7  # its KV is on a link; blocks held on both sides
    READY = 8  # KV is here; joins the running set at the next step
    RUNNING = 9  # in the running set
    FINISHED = 10
    SHED = 11  # refused by the policy
    FAILED = 12  # can never fit


class LaneKind(IntEnum):
    """What a lane is executing."""

    IDLE = 0
    PREFILL = 1
    DECODE = 2
    FUSED = 3
