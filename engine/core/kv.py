"""KV blocks: allocation, the hash-chained prefix cache, and its LRU order.

A request holds a chain of blocks, walked from its last block through ``block.parent``; a cached prefix is
shared by reference count. A block nobody references is spare when its content is unknown; one with a hash waits
in its pool's LRU list, where it can be revived, and is evicted when no spare block is left. A chain is released
from its end, hence a block always leaves the cache before its parent does, and whatever block a prefix look-up
finds, the whole chain behind it is intact (property-tested).
"""

from __future__ import annotations

import numpy as np

from engine.jit.kernel import kernel


@kernel(forceinline=True)
def blocks_for(tokens, block_tokens):
    """Blocks that hold ``tokens`` tokens."""
    return (tokens + block_tokens - 1) // block_tokens


@kernel(forceinline=True)
def could_hold(s, i, tokens):
    """Whether the pool of instance ``i``, were it empty, had room for the KV of ``tokens`` tokens."""
    return tokens <= s.pool[s.inst[i].pool].n_blocks * s.cluster[0].block_tokens


@kernel(forceinline=True)
def mixed(h, j):
    """``h`` and the number ``j`` as one hash: splitmix64 (Steele et al. 2014)."""
    z = h + np.uint64(j + 1) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@kernel
def _hash_at(s, r, j):
    """Chained hash of block ``j`` of request ``r``; 0 when its content is not known."""
    per = s.cluster[0].hash_tokens // s.cluster[0].block_tokens
    if per <= 0:
        return np.uint64(0)
    entry = j // per
    if entry >= s.req[r].hash_n:
        return np.uint64(0)
    return mixed(s.hashes[s.req[r].hash_off + entry], j - entry * per)


@kernel
def _lru_remove(s, p, b):
    before, after = s.cached[b].lru_prev, s.cached[b].lru_next
    if before >= 0:
        s.cached[before].lru_next = after
    else:
        s.pool[p].lru_head = after
    if after >= 0:
        s.cached[after].lru_prev = before
    else:
        s.pool[p].lru_tail = before


@kernel
def _lru_push(s, p, b):
    tail = s.pool[p].lru_tail
    s.cached[b].lru_prev = tail
    s.cached[b].lru_next = -1
    if tail >= 0:
        s.cached[tail].lru_next = b
    else:
        s.pool[p].lru_head = b
    s.pool[p].lru_tail = b


@kernel(forceinline=True)
def _bucket_of(s, p, h):
    return s.pool[p].bucket_base + np.int64(h & np.uint64(s.pool[p].n_buckets - 1))


@kernel
def _unpublish(s, p, b):
    """Take an evicted block out of the hash chains."""
    k = _bucket_of(s, p, s.cached[b].hash)
    at = s.bucket[k]
    if at == b:
        s.bucket[k] = s.cached[b].bucket_next
    else:
        while s.cached[at].bucket_next != b:
            at = s.cached[at].bucket_next
        s.cached[at].bucket_next = s.cached[b].bucket_next
    s.block[b].hashed = 0
    s.pool[p].cached -= 1
    s.pool[p].evicted += 1


@kernel
def _lookup(s, p, h):
    """A block of pool ``p`` with hash ``h``, -1 when there is none."""
    b = s.bucket[_bucket_of(s, p, h)]
    while b >= 0 and s.cached[b].hash != h:
        b = s.cached[b].bucket_next
    return b


@kernel
def find_prefix(s, p, r):
    """Longest cached prefix of request ``r`` in pool ``p``: (last block, number of blocks); (-1, 0) if none.

    At least one token is left to compute. Cached chains are prefix-closed, so the length is found by bisection.
    """
    if s.req[r].hash_n == 0 or s.pool[p].cached == 0:
        return np.int32(-1), 0
    if _lookup(s, p, _hash_at(s, r, 0)) < 0:
        return np.int32(-1), 0
    size = s.cluster[0].block_tokens
    limit = min((s.req[r].target - 1) // size, s.req[r].hash_n * (s.cluster[0].hash_tokens // size))
    if limit <= 0:
        return np.int32(-1), 0
    low, high = 1, limit
    while low < high:
        mid = (low + high + 1) // 2
        if _lookup(s, p, _hash_at(s, r, mid - 1)) >= 0:
            low = mid
        else:
            high = mid - 1
    return np.int32(_lookup(s, p, _hash_at(s, r, low - 1))), low


@kernel
def evictable_cost(s, b, n):
    """How many of the ``n`` blocks of the chain ending in ``b`` are free now and stop being so when adopted."""
    cost = 0
    for _ in range(n):
        if s.block[b].ref == 0:
            cost += 1
        b = s.block[b].parent
    return cost


@kernel
def adopt(s, p, b, n):
    """Reference the cached chain of ``n`` blocks that ends in block ``b``."""
    for _ in range(n):
        if s.block[b].ref == 0:
            _lru_remove(s, p, b)
            s.pool[p].free -= 1
        s.block[b].ref += 1
        b = s.block[b].parent


@kernel
def grow(s, p, tail, have, need):
    """Extend a chain of ``have`` blocks ending in ``tail`` to ``need`` blocks; the caller made sure they are free.

    :return: the new last block
    """
    base = s.pool[p].base
    if s.cluster[0].counted == 1:
        s.pool[p].spare_n -= max(need - have, 0)
        s.pool[p].free -= max(need - have, 0)
        return tail
    for _ in range(need - have):
        top = s.pool[p].spare_n
        if top > 0:
            b = s.spare[base + top - 1]
            s.pool[p].spare_n = top - 1
        else:
            b = s.pool[p].lru_head
            _lru_remove(s, p, b)
            _unpublish(s, p, b)
        s.block[b].ref = 1
        s.block[b].parent = tail
        tail = b
    s.pool[p].free -= max(need - have, 0)
    return tail


@kernel
def publish(s, p, r, before, after):
    """Put the blocks that request ``r`` completed by computing tokens [before, after) into the prefix cache."""
    if s.req[r].hash_n == 0 or s.cluster[0].counted == 1:
        return
    size = s.cluster[0].block_tokens
    first, last = before // size, after // size
    if last <= first:
        return
    b = s.req[r].tail
    for j in range(s.req[r].blocks - 1, first - 1, -1):
        if j < last and s.block[b].hashed == 0:
            h = _hash_at(s, r, j)
            if h != np.uint64(0):
                k = _bucket_of(s, p, h)
                s.cached[b].hash = h
                s.block[b].hashed = 1
                s.cached[b].bucket_next = s.bucket[k]
                s.bucket[k] = b
                s.pool[p].cached += 1
        b = s.block[b].parent


@kernel
def release_chain(s, p, tail, n):
    """Drop one reference from each of the ``n`` blocks of the chain ending in ``tail``, last block first."""
    if s.cluster[0].counted == 1:
        s.pool[p].spare_n += n
        s.pool[p].free += n
        return
    b = tail
    freed = 0
    for _ in range(n):
        parent = s.block[b].parent
        s.block[b].ref -= 1
        if s.block[b].ref == 0:
            if s.block[b].hashed == 1:
                _lru_push(s, p, b)
            else:
                top = s.pool[p].spare_n
                s.spare[s.pool[p].base + top] = b
                s.pool[p].spare_n = top + 1
            freed += 1
        b = parent
    s.pool[p].free += freed


@kernel
def release(s, r):
    """Give back every block of request ``r``."""
    release_chain(s, s.inst[s.req[r].inst].pool, s.req[r].tail, s.req[r].blocks)
    s.req[r].tail = -1
    s.req[r].blocks = 0
