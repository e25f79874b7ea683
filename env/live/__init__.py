"""A scenario's workload played against the real engine, in real time."""
