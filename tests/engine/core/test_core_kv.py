"""The prefix cache against a dictionary and an ordered dictionary, on random sequences of admissions and releases."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
from audit import block_hash
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, ProfileSpec, RequestSpec

from engine.core.kinds import Role
from engine.core.kv import adopt, evictable_cost, find_prefix, grow, publish, release
from engine.core.setup import ClusterOptions, InstanceSpec
from engine.core.state import ClusterState, attach
from engine.jit.kernel import kernel
from engine.jit.rows import addresses

SIZE = 4  # tokens per block


@kernel
def _admit(words, r, tokens):
    """Give request ``r`` blocks for ``tokens`` tokens: (prefix blocks, blocks it costs), -1 where there is no room."""
    s = attach(words)
    s.req[r].target = tokens
    prefix, n = find_prefix(s, 0, r)
    need = (tokens + SIZE - 1) // SIZE
    cost = need - n + evictable_cost(s, prefix, n)
    if cost > s.pool[0].free:
        return -1, cost
    adopt(s, 0, prefix, n)
    s.req[r].tail = grow(s, 0, prefix, n, need)
    s.req[r].blocks = need
    s.req[r].inst = 0
    return n, cost


@kernel
def _publish(words, r, before, after):
    publish(attach(words), 0, r, before, after)


@kernel
def _release(words, r):
    release(attach(words), r)


@dataclass
class Oracle:
    """Blocks by content: how often each is referenced, and the unreferenced ones in the order they will go."""

    n_blocks: int
    spare: int
    refs: dict[int, int] = field(default_factory=dict)  # content -> references
    idle: OrderedDict[int, None] = field(default_factory=OrderedDict)
    private: int = 0  # referenced blocks of unknown content

    def prefix(self, content: list[int], tokens: int) -> int:
        n = 0
        for h in content[: (tokens - 1) // SIZE]:
            if h not in self.refs:
                break
            n += 1
        return n

    def free(self) -> int:
        return self.spare + len(self.idle)

    def take(self, content: list[int], n: int, need: int) -> None:
        for h in content[:n]:
            self.refs[h] += 1
            self.idle.pop(h, None)
        for _ in range(need - n):
            if self.spare:
                self.spare -= 1
            else:
                gone, _ = self.idle.popitem(last=False)
                del self.refs[gone]
            self.private += 1


def _world(n_blocks: int, requests: list[tuple[int, int, int]]) -> tuple[ClusterState, list[list[int]]]:
    """A pool and requests (family, shared entries, hash entries) with the block contents of each."""
    specs = tuple(RequestSpec(1, 1, family=f, shared=min(s, n), hashed=n) for f, s, n in requests)
    options = ClusterOptions(block_tokens=SIZE, hash_tokens=2 * SIZE)
    case = Case((InstanceSpec(Role.MIXED, 0, n_blocks * SIZE),), specs, (ProfileSpec(),), options=options)
    state, _ = case.build()
    content = []
    for q in state.req:
        entries = state.hashes[q["hash_off"] : q["hash_off"] + q["hash_n"]].tolist()
        content.append([block_hash(h, j) for h in entries for j in range(2)])
    return state, content


_requests = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=8)
_actions = st.lists(st.tuples(st.integers(0, 7), st.integers(1, 60), st.booleans()), min_size=1, max_size=60)


@given(st.integers(4, 24), _requests, _actions)
def test_prefix_cache_does_what_a_dictionary_and_an_lru_list_do(
    n_blocks: int, requests: list[tuple[int, int, int]], actions: list[tuple[int, int, bool]]
) -> None:
    """One request computes at a time, so that no content is ever computed twice at once; several keep theirs."""
    state, content = _world(n_blocks, requests)
    words = addresses(state)
    oracle = Oracle(n_blocks, n_blocks)
    held: dict[int, tuple[list[int], int]] = {}  # request -> (known contents it holds, blocks of unknown content)
    for which, tokens, known in actions:
        r = which % len(requests)
        pool = state.pool[0]
        if r in held:
            _release(words, r)
            mine, private = held.pop(r)
            for h in reversed(mine):
                oracle.refs[h] -= 1
                if oracle.refs[h] == 0:
                    oracle.idle[h] = None
            oracle.spare += private
            oracle.private -= private
        else:
            n = oracle.prefix(content[r], tokens)
            need = -(-tokens // SIZE)
            cost = need - n + sum(oracle.refs[h] == 0 for h in content[r][:n])
            found = _admit(words, r, tokens)
            assert found[1] == cost
            assert found[0] == (n if cost <= oracle.free() else -1)
            if cost > oracle.free():
                continue
            oracle.take(content[r], n, need)
            full = content[r][: tokens // SIZE]
            # What another request has cached meanwhile keeps its block; publishing a second copy is the next test.
            if known and all(h not in oracle.refs for h in full[n:]):
                _publish(words, r, n * SIZE, tokens)
                for h in full[n:]:
                    oracle.refs[h] = 1
                oracle.private -= len(full) - n if len(full) > n else 0
                mine = full if len(full) > n else content[r][:n]
            else:
                mine = content[r][:n]
            held[r] = mine, need - len(mine)
        assert pool["free"] == oracle.free()
        assert pool["spare_n"] == oracle.spare
        assert pool["cached"] == len(oracle.refs)
        order, b = [], pool["lru_head"]
        while b >= 0:
            order.append(int(state.cached[b]["hash"]))
            b = state.cached[b]["lru_next"]
        assert order == list(oracle.idle), "eviction order"


def test_two_copies_of_one_prefix_are_both_used_up_before_the_prefix_is_forgotten() -> None:
    state, _ = _world(8, [(0, 1, 1), (0, 1, 1), (0, 1, 1), (1, 0, 0)])
    words = addresses(state)
    assert _admit(words, 0, 8) == (0, 2)
    assert _admit(words, 1, 8) == (0, 2)
    _publish(words, 0, 0, 8)
    _publish(words, 1, 0, 8)
    assert state.pool[0]["cached"] == 4
    _release(words, 0)
    _release(words, 1)
    # Four spare blocks and the two of one copy go to a stranger; the other copy still serves.
    assert _admit(words, 3, 6 * SIZE) == (0, 6)
    assert state.pool[0]["evicted"] == 2
    assert _admit(words, 2, 9)[0] in (-1, 2)
    assert state.pool[0]["cached"] == 2


def test_at_least_one_token_of_a_cached_prompt_is_left_to_compute() -> None:
    state, _ = _world(8, [(0, 2, 2), (0, 2, 2)])
    words = addresses(state)
    _admit(words, 0, 16)
    _publish(words, 0, 0, 16)
    assert _admit(words, 1, 16) == (3, 1)
    np.testing.assert_array_equal(np.sort(state.block["ref"])[-3:], [2, 2, 2])
