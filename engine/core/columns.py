"""The columns of a decision: what a policy may read, in which order, in which unit.

A decision has a context vector and one row per candidate. Both start with *dimensionless* columns (the
only ones a learned network reads) and go on with *raw* columns in physical units (what published rules
need). Every rule is ``decide(context, candidates, mask, params, memory) -> index``, see ``POLICY_SIGNATURE``.
Column indices are the members of the enumerations below; ``X_DIMENSIONLESS`` tells where raw columns start.
No column depends on the true output length of a request that has not finished.
"""

from __future__ import annotations

from enum import IntEnum


class Kind(IntEnum):
    """The four decision kinds (DESIGN.md section 4)."""

    PLACE_PREFILL = 0
    PLACE_DECODE = 1
    REALLOCATE = 2
    TUNE = 3


class Need(IntEnum):
    """What a policy asks the core to compute (bit mask); columns not asked for may hold anything."""

    LOAD = 1  # raw counts and token sums: O(1) per candidate
    PREDICT = 2  # predicted waits, steps and slacks (raw seconds): evaluates the latency profile
    DIMENSIONLESS = 4  # the dimensionless block (implies PREDICT)
    QUEUE = 8  # AHEAD_S and QUEUE_SLACK_S (implies PREDICT): walks the prefill queues


class Ctx(IntEnum):
    """Columns of the context vector."""

    # -- dimensionless
    IS_PLACE_PREFILL = 0
    IS_PLACE_DECODE = 1
    IS_REALLOCATE = 2
    IS_TUNE = 3
    SIZE = 4  # isolated prefill time ÷ TTFT target
    AGE = 5  # time waited so far ÷ TTFT target
    TPOT_TIGHTNESS = 6  # decode step of a batch of one ÷ TPOT target
    LOAD_MEAN = 7  # mean over prefill-capable instances of queued prefill work ÷ TTFT target
    LOAD_MIN = 8
    BATCH_MEAN = 9  # mean running sequences ÷ batch limit over decode-capable instances
    KV_MEAN = 10  # mean KV use
    PREFILL_RHO = 11  # arrival rate × mean isolated prefill time ÷ prefill-capable instances
    DECODE_RHO = 12  # arrival rate × mean output × decode step ÷ (decode-capable instances × batch limit)
    PREFILL_SHARE = 13  # prefill-capable instances ÷ instances
    DECODE_SHARE = 14
    TTFT_OK = 15  # smoothed share of recent requests that met their TTFT target
    TPOT_OK = 16
    HELD = 17  # held requests ÷ instances
    PROMPT_RATIO = 18  # prompt ÷ running mean of prompts
    EXPECTED_OUTPUT = 19  # mean output × decode step ÷ TTFT target
    # -- raw
    NOW_S = 20
    KIND = 21
    REQUEST = 22  # request index (-1 for control decisions)
    PROMPT = 23  # tokens
    ARRIVAL_S = 24
    TTFT_SLO_S = 25  # control decisions: of the first class, for a prompt of mean length
    TPOT_SLO_S = 26
    CLASS = 27
    GENERATED = 28
    SOURCE = 29  # PLACE_DECODE: instance that prefilled it; TUNE: the instance asked about
    ISOLATED_S = 30  # predicted prefill time alone on an idle whole device
    MEAN_PROMPT = 31
    MEAN_OUTPUT = 32
    HELD_N = 33
    # statistics of the last complete control interval (zero before the first one)
    WIN_SPAN_S = 34
    WIN_RATE = 35  # requests per second
    WIN_PROMPT = 36  # mean prompt tokens
    WIN_OUTPUT = 37  # mean output tokens of finished requests
    WIN_TTFT_S = 38
    WIN_TPOT_S = 39  # mean over finished requests of two tokens and more
    N_INSTANCES = 40
    TTFT_FACTOR = 41  # TTFT target ÷ isolated prefill time where the class sets it so, else 0 (control: first class)


class Col(IntEnum):
    """Columns of a candidate."""

    # -- dimensionless
    IS_INSTANCE = 0  # place on this instance
    IS_HOLD = 1
    IS_SHED = 2
    IS_KEEP = 3
    IN_PLACE = 4  # PLACE_DECODE: stay where it was prefilled (or zero-copy on a shared pool)
    ROLE_PREFILL = 5
    ROLE_DECODE = 6
    ROLE_MIXED = 7
    ROLE_MULTIPLEXED = 8
    TTFT = 9  # predicted TTFT ÷ target
    WAIT = 10  # predicted wait before its prefill starts ÷ TTFT target
    PREFILL = 11  # predicted prefill time here, after prefix hits ÷ TTFT target
    SLACK = 12  # least TPOT slack of the running set, in TPOT targets, scaled (see engine.core.decide.decision)
    SLACK_AFTER = 13  # the same after the stall this prefill causes
    STEP = 14  # predicted decode step ÷ tightest TPOT target running here (or the request's own)
    STEP_WITH = 15  # the same with this request added ÷ its own TPOT target
    KV = 16  # KV use, 0..1
    KV_WITH = 17  # KV use with this request added
    CACHED = 18  # share of the prompt found in the prefix cache here
    BATCH = 19  # running + ready + inbound sequences ÷ batch limit
    QUEUE = 20  # log1p(queued prompts)
    INBOUND = 21  # time to move what is inbound and this request's KV ÷ TPOT target, scaled
    QUEUE_WORK = 22  # queued prefill work ÷ TTFT target
    DRAINING = 23
    TO_PREFILL = 24  # REALLOCATE: new role
    TO_DECODE = 25
    TO_MIXED = 26
    TO_MULTIPLEXED = 27
    DECODE_SHARE = 28  # SM share of decode while both lanes run
    SPLIT_DELTA = 29  # TUNE: -1, 0, +1
    CHUNK = 30  # chunk budget ÷ 2048
    CHUNK_DELTA = 31  # TUNE: -1, 0, +1
    # -- raw
    INSTANCE = 32  # index, -1 for HOLD, SHED, KEEP
    ROLE = 33
    QUEUE_TOKENS = 34  # prompt tokens still to compute
    QUEUE_N = 35
    RUN_N = 36
    RUN_CTX = 37  # Σ context tokens of the running set
    OUTSTANDING = 38  # queue + running context + inbound tokens: "least tokens"
    FREE_BLOCKS = 39
    TOTAL_BLOCKS = 40
    CACHED_TOKENS = 41  # tokens of the prompt (PLACE_DECODE: of its KV) in the prefix cache here
    TTFT_S = 42  # predicted TTFT
    WAIT_S = 43
    PREFILL_S = 44
    STEP_S = 45
    STEP_WITH_S = 46
    MIN_SLACK_S = 47  # min over running of first token + TPOT target × tokens − now; large when empty
    INBOUND_N = 48
    INBOUND_TOKENS = 49
    # predicted time to move this request's KV here (0 in place); PLACE_PREFILL: from here to the instance that would
    # have it first, 0 where it may stay
    TRANSFER_S = 50
    NEW_ROLE = 51  # REALLOCATE, -1 otherwise
    BUSY = 52  # 1 while a step is in flight
    OUT_N = 53  # prefilled here, not yet pulled
    CHUNK_TOKENS = 54
    SPLIT = 55
    PREFILLING = 56  # 1 while a prefill step is in flight or partly done
    PROFILE = 57
    READY_N = 58  # of RUN_N: their KV is here, they join the running set at its next step
    AHEAD_S = 59  # predicted prefill work before this prompt's own, in the order this queue keeps
    # least over the queued prompts of arrival + TTFT target − predicted end of prefill, this prompt in its place in
    # the queue; large when none waits. Prompts whose first token is out do not count.
    QUEUE_SLACK_S = 60
    BECOMES = 61  # 1 + the role that a role change under way leads to; 0: none is


N_CONTEXT = len(Ctx)
N_CANDIDATE = len(Col)
CONTEXT_DIMENSIONLESS = int(Ctx.NOW_S)
CANDIDATE_DIMENSIONLESS = int(Col.INSTANCE)


def max_candidates(n_instances: int, *, realloc: bool = True) -> int:
    """Rows a decision buffer needs: every instance + HOLD + SHED, every (instance, role) + KEEP, or 5 (TUNE)."""
    return max(n_instances + 2, (1 + 3 * n_instances) if realloc else 0, 5)
