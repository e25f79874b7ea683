"""The decision log: what the guard decided and what became of it, one JSON line each, written by a process of its
own."""
