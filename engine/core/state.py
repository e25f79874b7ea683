"""The state of one cluster: record dtypes, enumerations and :class:`ClusterState`.

Everything the scheduler knows lives in these flat arrays, so the same compiled functions serve the live
engine (one cluster, wall clock) and the surrogate (one or many clusters, simulated clock). Times are int64
ticks of 1 ps, lengths are tokens, links between records are int32 indices with -1 for "none".
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.jit.rows import make_attach
from engine.latency.evaluate import PROFILE, SHARE

#: A time that never comes: later than any stamp with a target added to it.
NEVER = 2**63 - 1
#: Rows that a table of SM splits may have.
MAX_TABLE = 8


CLUSTER = np.dtype(
    [
        ("n_instances", np.int32),
        ("n_requests", np.int32),
        ("n_pools", np.int32),
        ("n_links", np.int32),
        ("n_classes", np.int32),
        ("block_tokens", np.int32),
        ("counted", np.int32),  # 1: nobody asks which blocks a request holds, only how many (no prefix data, no engine)
        ("hash_tokens", np.int32),  # tokens covered by one entry of ``hashes`` (a multiple of block_tokens)
        ("allow_hold", np.int32),
        ("allow_shed", np.int32),
        ("ask_decode", np.int32),  # 1: PLACE_DECODE is a policy decision also where staying is possible
        ("ask_realloc", np.int32),
        ("ask_tune", np.int32),
        ("roles_allowed", np.int32),  # bit mask of roles a REALLOCATE may choose
        ("min_prefill", np.int32),  # instances that must stay able to prefill / decode
        ("min_decode", np.int32),
        ("at_once", np.int32),  # instances that may be in a role change at the same time
        ("hand_over", np.int32),  # 1: an instance that changes its role hands its running decodes to others
        ("hold_ticks", np.int64),  # a held request is asked for again at the latest after this time
        ("hold_limit", np.int64),  # nobody is held longer than this after arrival
        ("hold_scan", np.int32),  # held requests asked for again per epoch
        ("control_ticks", np.int64),
        ("horizon_ticks", np.int64),
        # -- decisions waiting for an answer (requests wait in the lists PLACING, HANDOVER and HELD)
        ("realloc_due", np.int32),
        ("tune_next", np.int32),  # next instance of the running TUNE sweep, -1 when none
        ("moving_roles", np.int32),  # instances in a role change
        # -- bookkeeping
        ("n_sent", np.int64),
        ("n_done", np.int64),  # finished + shed + failed
        ("n_finished", np.int64),
        ("n_shed", np.int64),
        ("n_failed", np.int64),
        ("n_preempted", np.int64),
        ("n_migrated", np.int64),
        ("migrated_tokens", np.int64),
        ("n_switches", np.int64),
        ("looked_up_tokens", np.int64),  # prompt tokens looked up in the prefix cache, at a request's first admission
        ("cached_tokens", np.int64),  # of these, found there
        ("tokens_out", np.int64),
        ("steps", np.int64),
        ("good_weight", np.float64),  # Σ weight of requests sealed as good
        ("miss_weight", np.float64),
        ("sealed", np.int64),
        # -- running means a policy may read (no true output length of a live request enters them)
        ("mean_prompt", np.float64),
        ("mean_output", np.float64),  # of finished requests
        ("ema_ttft_ok", np.float64),
        ("ema_tpot_ok", np.float64),
        ("ema_gap", np.float64),  # smoothed time between arrivals, ticks
        ("last_arrival", np.int64),
        ("origin_s", np.float64),  # live: how long before its origin the clock began, see engine.core.origin
        # -- the control interval now running
        ("win_start", np.int64),
        ("win_arrivals", np.int64),
        ("win_prompt", np.float64),
        ("win_finished", np.int64),
        ("win_output", np.float64),
        ("win_first", np.int64),  # first tokens in the interval
        ("win_ttft", np.float64),  # Σ TTFT, seconds
        ("win_timed", np.int64),  # of those finished, with two tokens or more: one token has no TPOT
        ("win_tpot", np.float64),  # Σ TPOT of these, seconds
        # -- the last complete control interval
        ("last_span_s", np.float64),
        ("last_rate", np.float64),
        ("last_prompt", np.float64),
        ("last_output", np.float64),
        ("last_ttft_s", np.float64),
        ("last_tpot_s", np.float64),
        # -- bounded waits
        ("hold_due", np.int64),  # somebody held now may not be held longer than this
        ("tail_factor", np.float64),  # second deadline of a first token: so many TTFT targets after the arrival
        ("lag", np.int64),  # ticks since its instances were like this; above 0 only in what a router is shown
    ],
    align=True,
)

INSTANCE = np.dtype(
    [
        ("role", np.int32),
        ("target_role", np.int32),  # -1 unless a role change is under way
        ("switching", np.int32),  # 1 while the switch itself (after the drain) is paid for
        # 1: its thread or process is gone; nothing is given to it any more. 2: it does not answer now and may come back
        ("lost", np.int32),
        ("gpu", np.int32),
        ("pool", np.int32),
        ("link", np.int32),  # ingress link that KV for this instance travels on
        ("profile", np.int32),
        ("batching", np.int32),
        ("batching_after", np.int32),  # in its place once the instance becomes, or ceases to be, MULTIPLEXED
        ("chunk_tokens", np.int32),  # token budget of a fused step / a prefill chunk
        ("prefill_tokens", np.int32),  # token budget of a whole-prompt prefill batch
        ("max_batch", np.int32),  # running sequences
        ("max_prefills", np.int32),  # prompts in one prefill batch
        ("max_ctx", np.int64),  # context tokens in one decode step (a peer's option; huge by default)
        ("rotate", np.int32),  # 1: where max_ctx leaves some out, decode takes turns (a peer's option)
        ("split", np.int32),  # share row for decode while both lanes run, or a Split
        ("row", np.int32),  # TABLE, ON_DEMAND: the share row in force
        ("table_n", np.int32),  # TABLE: rows, their least decode batch sizes (ascending) and share rows
        ("table_bs", np.int32, (MAX_TABLE,)),
        ("table_row", np.int32, (MAX_TABLE,)),
        ("layer_tokens", np.int32),  # LAYERED: slices of layer_tokens ÷ prompt tokens layers; 0: as decode lasts
        ("stand_aside", np.int32),  # LAYERED, 1: a batch may stand aside between layers for a short prompt, see parking
        ("order", np.int32),
        ("headroom", np.float64),  # the predictor rule aims at headroom × TPOT target
        ("watermark", np.float64),  # share of the pool that a prompt which starts beside others must leave free
        ("whole_prompt", np.int32),  # 1: a prompt starts when all its blocks are free, not those of a chunk
        ("pause_preempt", np.int32),  # 1: no prompt starts in a step that preempted
        # -- prefill queue (WAITING and PREFILLING; list QUEUE)
        ("queue_tokens", np.int64),  # tokens still to compute
        ("queue_work", np.int64),  # their predicted prefill time, ticks
        ("started_n", np.int32),  # queued requests that hold blocks
        # -- the prefill batch that stands aside, half computed (row N + i of ``prefills``), as its lane knew it
        ("parked_n", np.int32),  # its prompts; 0: none stands aside
        ("parked_layer", np.int32),  # layers it has computed
        ("parked_sum_n", np.int64),
        ("parked_sum_n2", np.float64),
        ("parked_sum_nr", np.float64),
        ("parked_work", np.int64),
        ("stood_aside", np.int64),  # how often one did
        # -- requests assigned here whose KV is elsewhere (list INBOUND, then a link)
        ("inbound_tokens", np.int64),
        ("moving_n", np.int32),
        # -- running set (requests whose KV is here wait in list READY to join it)
        ("run_n", np.int32),
        ("run_ctx", np.int64),  # Σ context of the running set, as booked
        ("unbooked", np.int64),  # decode steps done by the clock but not yet booked (surrogate jumps)
        ("last_decode_end", np.int64),
        ("decode_turn", np.int32),  # DECODE role: a decode step is due before the next local prefill
        ("out_n", np.int32),  # prefilled here, still holding blocks until the receiver has pulled
        ("held_tokens", np.int64),  # tokens with KV here outside the running set
        ("dirty", np.int32),  # something changed that may let an idle lane start
        ("steps", np.int64),
        ("preempted", np.int64),
        ("remote", np.int32),  # 1: an engine of others that runs by itself, see engine.core.events.observed
    ],
    align=True,
)

LANE = np.dtype(
    [
        ("kind", np.int32),
        ("share", np.int32),  # share row in force
        ("corun", np.int32),  # the other lane was busy when this step started
        ("n_prefills", np.int32),  # entries of ``prefills[i]`` in this step
        ("bs", np.int32),
        ("layer_from", np.int32),
        ("layer_to", np.int32),
        ("sum_n", np.int64),
        ("sum_n2", np.float64),
        ("sum_nr", np.float64),
        ("sum_ctx", np.int64),
        ("start", np.int64),
        ("work", np.int64),  # part of queue_work that its prompts stand for
        ("max_steps", np.int64),  # decode steps that may run without replanning
    ],
    align=True,
)

#: The fields that every decode step touches come first and share a cache line.
REQUEST = np.dtype(
    [
        ("last_token", np.int64),
        ("first_token", np.int64),
        ("tpot_slo", np.int64),
        ("generated", np.int32),
        ("output", np.int32),  # tokens it will produce; no policy ever sees it
        ("computed", np.int32),  # tokens whose KV exists
        ("blocks", np.int32),
        ("tail", np.int32),  # last block of its chain
        ("hash_n", np.int32),
        ("state", np.int16),
        ("cls", np.int16),
        ("inst", np.int32),  # instance that holds its queue entry and KV
        ("next", np.int32),
        ("prev", np.int32),
        ("arrival", np.int64),
        ("ttft_slo", np.int64),
        ("placed", np.int64),
        ("prefill_start", np.int64),
        ("finished", np.int64),
        ("think", np.int64),
        ("hash_off", np.int64),
        ("work", np.int64),  # predicted prefill ticks booked in queue_work
        ("prompt", np.int32),
        ("target", np.int32),  # prefill is done when computed reaches it
        ("cached", np.int32),  # tokens found in the prefix cache at first admission
        ("sched", np.int32),  # tokens of it in the step in flight
        ("dst_blocks", np.int32),  # its chain at the receiver while its KV moves
        ("dst_tail", np.int32),
        ("dst_cached", np.int32),  # tokens the receiver had cached
        ("dest", np.int32),  # instance that will decode it
        ("next_turn", np.int32),  # request sent ``think`` after this one finishes, -1 none
        ("n_preempt", np.int32),
        ("chain", np.int32),  # number of its chain of blocks: another one after a recomputation or a transfer
        ("first_inst", np.int32),  # where its prefill was placed first
        ("priority", np.int32),  # prompts of a lower value start first; equal ones in order of arrival
        # how often it was given up: 1 for its TTFT target (order ON_TIME, computed after those that can meet theirs),
        # 2 for its second deadline too; -1: that is near, so it goes first; -2: it has its turn (``schedule.bounds``)
        ("late", np.int8),
        ("ttft_ok", np.int8),  # -1 unknown, 0 missed, 1 met
        ("tpot_ok", np.int8),
        ("sealed", np.int8),
    ],
    align=True,
)

POOL = np.dtype(
    [
        ("base", np.int32),  # first block
        ("n_blocks", np.int32),
        ("free", np.int32),  # blocks nobody references: spare ones and cached ones
        ("spare_n", np.int32),  # ... of unknown content, on the pool's stretch of the ``spare`` stack
        ("lru_head", np.int32),  # cached block to be evicted next
        ("lru_tail", np.int32),
        ("bucket_base", np.int64),
        ("n_buckets", np.int64),  # power of two
        ("sharers", np.int32),  # instances on this pool
        ("cached", np.int32),  # blocks with a hash, referenced or not
        ("evicted", np.int64),
    ],
    align=True,
)

BLOCK = np.dtype(
    [
        ("parent", np.int32),  # the block before it in its sequence
        ("ref", np.int16),
        ("hashed", np.int16),
    ],
    align=True,
)

#: The prefix cache's part of a block, apart because requests without prefix data never touch it.
CACHED = np.dtype(
    [
        ("hash", np.uint64),
        ("lru_prev", np.int32),
        ("lru_next", np.int32),
        ("bucket_next", np.int32),
    ],
    align=True,
)

LINK = np.dtype(
    [
        ("busy", np.int32),  # the head of its list is in transfer
        ("tokens", np.int64),  # tokens on it or waiting for it
        ("bytes_per_s", np.float64),
        ("latency_s", np.float64),
    ],
    align=True,
)

SLO_CLASS = np.dtype(
    [
        ("weight", np.float64),
        ("ttft_s", np.float64),  # fixed target; used when ttft_factor is 0
        ("ttft_factor", np.float64),  # target = factor × isolated prefill time (at least ttft_s)
        ("tpot_s", np.float64),
        ("sent", np.int64),
        ("good", np.int64),
        ("ttft_ok", np.int64),
        ("tpot_ok", np.int64),
    ],
    align=True,
)


class ClusterState(NamedTuple):
    """One cluster. Batched environments hold the same arrays with one more leading axis.

    Shapes: N instances, R requests, P pools, B blocks over all pools, L links, C classes, M share rows.
    """

    cluster: np.ndarray  # CLUSTER (1,)
    inst: np.ndarray  # INSTANCE (N,)
    lane: np.ndarray  # LANE (N, 2): 0 prefill or fused lane, 1 decode lane
    req: np.ndarray  # REQUEST (R,)
    pool: np.ndarray  # POOL (P,)
    block: np.ndarray  # BLOCK (B,)
    cached: np.ndarray  # CACHED (B,)
    spare: np.ndarray  # int32 (B,): one stack of free blocks per pool, from its base
    bucket: np.ndarray  # int32: heads of the prefix cache's hash chains
    link: np.ndarray  # LINK (L,)
    lists: np.ndarray  # int32 (4 + 3 N + L, 3): head, tail, length of each request list, see lists.py
    cls: np.ndarray  # SLO_CLASS (C,)
    run: np.ndarray  # int32 (N, max_batch): running requests, oldest admission first
    prefills: np.ndarray  # int32 (2 N, max_prefills): requests of the prefill step in flight; N + i: of a parked one
    hashes: np.ndarray  # uint64: chained prefix hashes of all requests
    profile: np.ndarray  # engine.latency.evaluate.PROFILE (n,)
    share: np.ndarray  # engine.latency.evaluate.SHARE (n, M)
    due: np.ndarray  # int64 (N, C): per class, least first token + TPOT target × tokens of the running set
    watch: np.ndarray  # float64 (N,): ticks before which no second deadline in the queue of an instance can be near
    turn: np.ndarray  # float64 (N,): ticks when the next prompt there that was given up twice goes first
    itl: np.ndarray  # int64 (ITL_BINS,): histogram of token gaps, see engine.core.slo


#: The state behind an address vector (``rows.addresses`` of a ClusterState), for use inside kernels.
attach = make_attach(
    "ClusterState",
    [
        ("cluster", CLUSTER, 1),
        ("inst", INSTANCE, 1),
        ("lane", LANE, 2),
        ("req", REQUEST, 1),
        ("pool", POOL, 1),
        ("block", BLOCK, 1),
        ("cached", CACHED, 1),
        ("spare", np.int32, 1),
        ("bucket", np.int32, 1),
        ("link", LINK, 1),
        ("lists", np.int32, 2),
        ("cls", SLO_CLASS, 1),
        ("run", np.int32, 2),
        ("prefills", np.int32, 2),
        ("hashes", np.uint64, 1),
        ("profile", PROFILE, 1),
        ("share", SHARE, 2),
        ("due", np.int64, 2),
        ("watch", np.float64, 1),
        ("turn", np.float64, 1),
        ("itl", np.int64, 1),
    ],
)
