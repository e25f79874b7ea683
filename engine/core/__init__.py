"""The scheduling core: pure, compiled functions over flat arrays, for the engine and the surrogate alike.

What lives here decides what happens next; it never reads a clock, runs a model or learns. ``state`` has the arrays,
``schedule`` says what runs next, ``events`` what happened, ``decide`` what a policy is asked; ``kv`` has the blocks,
``slo`` the books, and ``loop`` is the way in for a driver outside compiled code.
"""
