"""Recount the state of a cluster from first principles, in plain Python, and compare it with the core's books."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from engine.core.kinds import LaneKind, RequestState, Role
from engine.core.lists import ENDED, HANDOVER, HELD, PLACING
from engine.core.state import NEVER, ClusterState
from env.surrogate.clock import Sim

S = RequestState
_MASK = 2**64 - 1


def block_hash(entry: int, j: int) -> int:
    """Hash of sub-block ``j`` of a hash entry: splitmix64's finaliser, written a second time."""
    z = (entry + (j + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class _Books:
    """The arrays of one cluster as plain lists and dicts (numpy records are slow to read one by one)."""

    def __init__(self, s: ClusterState) -> None:
        def records(array: np.ndarray) -> list[dict[str, Any]]:
            names = array.dtype.names
            return [dict(zip(names, row, strict=True)) for row in array.tolist()]

        self.c = records(s.cluster)[0]
        self.req, self.inst, self.pool = records(s.req), records(s.inst), records(s.pool)
        self.lane = [records(row) for row in s.lane]
        self.link, self.cls = records(s.link), records(s.cls)
        self.block, self.cached = s.block.tolist(), s.cached.tolist()
        self.spare, self.bucket, self.lists = s.spare.tolist(), s.bucket.tolist(), s.lists.tolist()
        self.run, self.prefills, self.due = s.run.tolist(), s.prefills.tolist(), s.due.tolist()
        self.hashes, self.itl = s.hashes.tolist(), int(s.itl.sum())


def _walk(b: _Books, k: int) -> list[int]:
    head, tail, length = b.lists[k]
    found, before, r = [], -1, head
    while r >= 0:
        assert len(found) < length, f"list {k} is longer than its length {length}, or a ring"
        assert b.req[r]["prev"] == before, f"list {k}: prev of request {r}"
        found.append(r)
        before, r = r, b.req[r]["next"]
    assert before == tail, f"list {k}: tail"
    assert len(found) == length, f"list {k}: length"
    return found


def _places(b: _Books) -> dict[int, list[int]]:
    """Every request is where its state says, once; returns the members of each list."""
    n = len(b.inst)
    members = {k: _walk(b, k) for k in range(len(b.lists))}
    where: dict[int, tuple[str, int]] = {}

    def put(r: int, place: tuple[str, int]) -> None:
        assert r not in where, f"request {r} is in {where[r]} and in {place}"
        where[r] = place

    for k, found in members.items():
        for r in found:
            put(r, ("list", k))
    in_step = []
    for i, inst in enumerate(b.inst):
        assert 0 <= inst["run_n"] <= inst["max_batch"]
        for slot in range(inst["run_n"]):
            put(b.run[i][slot], ("run", i))
        for lane in b.lane[i]:
            in_step += b.prefills[i][: lane["n_prefills"]]
        in_step += b.prefills[len(b.inst) + i][: inst["parked_n"]]
        assert inst["parked_n"] == 0 or (inst["role"] == Role.MULTIPLEXED and inst["stand_aside"] == 1)
    assert len(in_step) == len(set(in_step)), "a prompt is in two steps"
    for r, q in enumerate(b.req):
        state, i, dest = q["state"], q["inst"], q["dest"]
        place = where.get(r)
        if state == S.NEW:
            assert place is None
        elif state in (S.PLACING, S.HELD, S.HANDOVER):
            assert place == ("list", {S.PLACING: PLACING, S.HELD: HELD, S.HANDOVER: HANDOVER}[state]), (r, place)
        elif state in (S.WAITING, S.PREFILLING):
            assert place == ("list", 4 + 3 * i), (r, state, place)
        elif state == S.INBOUND:
            assert place == ("list", 5 + 3 * dest), (r, place)
        elif state == S.MOVING:
            assert place == ("list", 4 + 3 * n + b.inst[dest]["link"]), (r, place)
        elif state == S.READY:
            assert place == ("list", 6 + 3 * i), (r, place)
        elif state == S.RUNNING:
            assert place == ("run", i), (r, place)
        else:
            assert place is None or (place == ("list", ENDED) and q["next_turn"] >= 0), (r, place)
        assert (state == S.PREFILLING) == (r in in_step) == (q["sched"] > 0), (r, state, q["sched"])
        assert 0 <= q["computed"] + q["sched"] <= q["prompt"] + q["output"]
        assert q["generated"] <= q["output"]
    arrivals = [b.req[r]["arrival"] for r in members[HELD]]
    assert arrivals == sorted(arrivals), "held requests are asked for oldest first"
    return members


def _chain(b: _Books, tail: int, n: int) -> list[int]:
    """Blocks of a chain, first block first."""
    found = []
    for _ in range(n):
        found.append(tail)
        tail = b.block[tail][0]
    assert tail == -1, "a chain is longer than its owner thinks"
    return found[::-1]


def _blocks(b: _Books) -> None:
    size = b.c["block_tokens"]
    refs: Counter[int] = Counter()
    for r, q in enumerate(b.req):
        assert (q["blocks"] > 0) == (q["tail"] >= 0), (r, q["blocks"], q["tail"])
        held = q["inst"] >= 0 and S.WAITING <= q["state"] <= S.RUNNING
        assert held or q["blocks"] == q["dst_blocks"] == 0, f"request {r} in state {q['state']} holds blocks"
        chains = [(q["inst"], q["tail"], q["blocks"])]
        if q["dst_blocks"] > 0:
            assert q["state"] == S.MOVING
            chains.append((q["dest"], q["dst_tail"], q["dst_blocks"]))
            assert q["dst_blocks"] * size > q["computed"]
        for i, tail, n in chains:
            if n == 0:
                continue
            pool = b.pool[b.inst[i]["pool"]]
            chain = _chain(b, tail, n)
            assert len(set(chain)) == n
            assert all(pool["base"] <= x < pool["base"] + pool["n_blocks"] for x in chain), f"request {r}: wrong pool"
            refs.update(chain)
        if held and q["blocks"] > 0:
            assert q["blocks"] * size >= q["computed"] + q["sched"], f"request {r}: tokens without a block"
            assert q["blocks"] <= -(-(q["prompt"] + q["output"]) // size), f"request {r}: more blocks than it can fill"
        elif S.HANDOVER <= q["state"] <= S.RUNNING:
            raise AssertionError(f"request {r} in state {q['state']} without blocks")
    for x, (_, ref, _) in enumerate(b.block):
        assert ref == refs[x], f"block {x}: counts {ref} references, has {refs[x]}"


def _order(b: _Books) -> dict[int, tuple[int, int]]:
    """Block hash -> (position, hash before it) over all requests."""
    size, coarse = b.c["block_tokens"], b.c["hash_tokens"]
    if not coarse:
        return {}
    known: dict[int, tuple[int, int]] = {}
    per = coarse // size
    for q in b.req:
        before = 0
        for e in range(q["hash_n"]):
            for j in range(per):
                h = block_hash(b.hashes[q["hash_off"] + e], j)
                known[h] = (e * per + j, before)
                before = h
    return known


def _pools(b: _Books) -> None:
    known = _order(b)
    for p, pool in enumerate(b.pool):
        mine = range(pool["base"], pool["base"] + pool["n_blocks"])
        used = sum(1 for x in mine if b.block[x][1] > 0)
        assert pool["free"] + used == pool["n_blocks"], f"pool {p}: free {pool['free']}, used {used}"
        spare = b.spare[pool["base"] : pool["base"] + pool["spare_n"]]
        lru, before, x = [], -1, pool["lru_head"]
        while x >= 0:
            assert len(lru) < pool["n_blocks"], "the LRU list is a ring"
            assert b.cached[x][1] == before
            lru.append(x)
            before, x = x, b.cached[x][2]
        assert before == pool["lru_tail"]
        assert len(spare) + len(lru) == pool["free"]
        assert len(set(spare) | set(lru)) == pool["free"], f"pool {p}: a block is spare or evictable twice"
        assert all(x in mine and b.block[x][1] == 0 and b.block[x][2] == 0 for x in spare), f"pool {p}: spare"
        assert all(x in mine and b.block[x][1] == 0 and b.block[x][2] == 1 for x in lru), f"pool {p}: LRU"
        hashed = [x for x in mine if b.block[x][2] == 1]
        assert len(hashed) == pool["cached"]
        found: list[int] = []
        for k in range(pool["n_buckets"]):
            x = b.bucket[pool["bucket_base"] + k]
            while x >= 0:
                assert len(found) <= pool["n_blocks"], "a hash chain is a ring"
                assert b.cached[x][0] % pool["n_buckets"] == k
                found.append(x)
                x = b.cached[x][3]
        assert sorted(found) == hashed, f"pool {p}: hashed blocks and buckets differ"
        for x in hashed:
            position, before = known[b.cached[x][0]]
            parent = b.block[x][0]
            if position == 0:
                assert parent == -1
            else:
                assert parent >= 0, f"block {x} cached without its prefix"
                assert b.block[parent][2] == 1, f"block {x} cached, its parent {parent} not"
                assert b.cached[parent][0] == before, f"block {x} hangs on a block of other content"


def _instances(b: _Books, members: dict[int, list[int]]) -> None:
    n = len(b.inst)
    for i, inst in enumerate(b.inst):
        queue = [b.req[r] for r in members[4 + 3 * i]]
        running = [b.req[r] for r in b.run[i][: inst["run_n"]]]
        here = [q for q in b.req if q["inst"] == i]
        out = [q for q in here if q["state"] in (S.HANDOVER, S.INBOUND, S.MOVING)]
        coming = [q for q in b.req if q["dest"] == i and q["state"] in (S.INBOUND, S.MOVING)]
        waiting = [q for q in here if q["state"] in (S.WAITING, S.PREFILLING) and q["blocks"] > 0]
        ready = [q for q in here if q["state"] == S.READY]
        due = [NEVER] * len(b.cls)
        for q in running:
            due[q["cls"]] = min(due[q["cls"]], q["first_token"] + q["tpot_slo"] * q["generated"])
        expected = {
            "queue_tokens": sum(q["target"] - q["computed"] for q in queue),
            "queue_work": sum(q["work"] for q in queue),
            "started_n": len(waiting),
            "run_ctx": sum(q["computed"] for q in running),
            "inbound_tokens": sum(q["computed"] for q in coming),
            "moving_n": sum(1 for q in coming if q["state"] == S.MOVING),
            "out_n": len(out),
            "held_tokens": sum(q["computed"] for q in waiting + out + ready),
        }
        for name, value in expected.items():
            assert inst[name] == value, f"instance {i}: {name} is {inst[name]}, a recount gives {value}"
        assert b.due[i] == due, f"instance {i}: due"
        if inst["switching"]:
            assert inst["target_role"] >= 0
            assert not queue
            assert all(lane["kind"] == LaneKind.IDLE for lane in b.lane[i])
    for k, link in enumerate(b.link):
        on = [b.req[r] for r in members[4 + 3 * n + k]]
        assert link["tokens"] == sum(q["computed"] - q["dst_cached"] for q in on), f"link {k}: tokens"
        assert not link["busy"] or on
    assert b.c["moving_roles"] == sum(1 for inst in b.inst if inst["target_role"] >= 0)
    assert b.c["steps"] == sum(i["steps"] for i in b.inst)


def _stamps(b: _Books, now: int) -> None:
    for r, q in enumerate(b.req):
        if q["state"] == S.NEW:
            assert q["generated"] == 0
            continue
        stamps = [q[name] for name in ("arrival", "placed", "prefill_start", "first_token", "last_token", "finished")]
        if q["n_preempt"]:  # it may have been placed again after it had started elsewhere
            stamps[1] = stamps[0]
        seen = [t for t in stamps if t >= 0]
        assert seen == sorted(seen), f"request {r}: stamps {stamps}"
        assert seen[-1] <= now
        assert (q["first_token"] >= 0) == (q["last_token"] >= 0) == (q["generated"] > 0)
        if q["generated"]:
            assert q["prefill_start"] < q["first_token"]
        assert (q["finished"] >= 0) == (q["state"] >= S.FINISHED)
        if q["state"] == S.FINISHED:
            assert q["generated"] == q["output"]
            assert q["last_token"] == q["finished"]


def _counters(b: _Books) -> None:
    assert b.c["n_preempted"] == sum(i["preempted"] for i in b.inst) == sum(q["n_preempt"] for q in b.req)
    sent = [q for q in b.req if q["state"] != S.NEW]
    ended = Counter(q["state"] for q in sent if q["state"] >= S.FINISHED)
    c = b.c
    assert c["n_sent"] == len(sent)
    assert (c["n_finished"], c["n_shed"], c["n_failed"]) == (ended[S.FINISHED], ended[S.SHED], ended[S.FAILED])
    assert c["n_done"] == sum(ended.values())
    assert c["tokens_out"] == sum(q["generated"] for q in sent), "every token is counted once, recomputed ones never"
    assert b.itl == sum(max(q["generated"] - 1, 0) for q in sent), "one gap per token after the first"
    assert c["cached_tokens"] == sum(q["cached"] for q in sent)
    good = missed = 0.0
    for k, cls in enumerate(b.cls):
        mine = [q for q in sent if q["cls"] == k]
        for q in mine:
            if q["first_token"] >= 0:
                assert q["ttft_ok"] == (q["first_token"] - q["arrival"] <= q["ttft_slo"])
            if q["state"] == S.FINISHED:
                assert q["tpot_ok"] == (q["last_token"] - q["first_token"] <= q["tpot_slo"] * (q["output"] - 1))
            assert q["sealed"] == (q["state"] >= S.FINISHED or q["ttft_ok"] == 0)
        well = sum(1 for q in mine if q["state"] == S.FINISHED and q["ttft_ok"] == 1 and q["tpot_ok"] == 1)
        assert cls["sent"] == len(mine)
        assert cls["good"] == well
        assert cls["ttft_ok"] == sum(1 for q in mine if q["ttft_ok"] == 1)
        assert cls["tpot_ok"] == sum(1 for q in mine if q["tpot_ok"] == 1)
        good += cls["weight"] * well
        missed += cls["weight"] * (sum(q["sealed"] for q in mine) - well)
    assert c["sealed"] == sum(q["sealed"] for q in sent)
    np.testing.assert_allclose([c["good_weight"], c["miss_weight"]], [good, missed], rtol=1e-12, atol=1e-12)


def _sessions(b: _Books) -> None:
    """A follow-up turn is sent ``think`` after its parent finished, and never when it did not."""
    for r, q in enumerate(b.req):
        after = q["next_turn"]
        if after < 0:
            continue
        if b.req[after]["state"] != S.NEW:
            assert q["state"] == S.FINISHED
            assert b.req[after]["arrival"] == q["finished"] + q["think"], f"turn after request {r}"


def _events(q: Sim) -> None:
    """The tournament over event times is in order."""
    size = int(q.sim[0]["size"])
    when = q.when.tolist()
    tree = q.tree.tolist()
    least = min(range(len(when)), key=lambda k: (when[k], k))
    assert tree[1] == least or when[tree[1]] == when[least]
    assert size >= len(when)
    heap = q.heap_t[: q.sim[0]["heap_n"]].tolist()
    assert all(heap[(k - 1) // 2] <= heap[k] for k in range(1, len(heap)))


def check(state: ClusterState, sim: Sim) -> None:
    """Everything that must hold whenever a decision has just been answered."""
    b = _Books(state)
    members = _places(b)
    _blocks(b)
    _pools(b)
    _instances(b, members)
    _stamps(b, int(sim.sim[0]["now"]))
    _counters(b)
    _sessions(b)
    _events(sim)


def recount(state: ClusterState) -> None:
    """What must hold of requests, blocks and instances, whoever drives the cluster."""
    b = _Books(state)
    members = _places(b)
    _blocks(b)
    _pools(b)
    _instances(b, members)


def check_end(state: ClusterState, sim: Sim) -> None:
    """Everything that must hold when a run has ended by itself: nobody is left, nothing is held."""
    check(state, sim)
    c = state.cluster[0]
    stuck = [(r, S(int(q["state"])).name) for r, q in enumerate(state.req) if S.NEW < q["state"] < S.FINISHED]
    assert not stuck, f"requests that never end: {stuck}"
    assert c["n_done"] == c["n_sent"]
    for r, q in enumerate(state.req):
        if q["state"] == S.NEW:
            parents = np.flatnonzero(state.req["next_turn"] == r)
            assert len(parents) == 1, f"request {r} was never sent"
            assert state.req[parents[0]]["state"] != S.FINISHED, f"turn {r} was never sent"
    assert not state.block["ref"].any()
    assert (state.pool["free"] == state.pool["n_blocks"]).all()
    assert not state.lists[:, 2].any()
    assert (state.lane["kind"] == LaneKind.IDLE).all()
    sums = ("queue_tokens", "queue_work", "held_tokens", "run_ctx", "inbound_tokens", "out_n", "started_n", "moving_n")
    for name in sums:
        assert not state.inst[name].any(), name
    assert (state.due == NEVER).all()
