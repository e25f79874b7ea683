"""Instances in other processes: the pool, their KV, the wire between, and the worker itself."""
