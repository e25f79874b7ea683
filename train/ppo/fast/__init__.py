"""PPO compiled: reading decisions, acting on them, and the passes of an update."""
