"""Surrogate and engine side by side."""
