"""Rollouts collected by Ray actors."""
