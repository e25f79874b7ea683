"""Compiled loops of PPO: reading decisions, acting on them, and the passes of an update.

One folder, because the on-disk cache of compiled code is named after its sources (see ``engine.jit.kernel``).
"""
