"""The scheduling core: pure, compiled functions over flat arrays, for the engine and the surrogate alike.

What lives here decides what happens next; it never reads a clock, runs a model or learns. ``state`` has the arrays,
``decision`` what a policy is asked, ``batching`` what a lane does, ``lifecycle``, ``handover`` and ``roles`` what
happens to requests and instances, ``kv`` the blocks, ``slo`` the books.
"""
