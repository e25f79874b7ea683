"""Gymnasium environments and vector environments around the surrogate and the engine."""
