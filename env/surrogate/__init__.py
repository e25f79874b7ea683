"""The surrogate: the scheduling core under an event queue and a latency profile."""
