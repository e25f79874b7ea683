"""Studies over training and evaluation together: scoreboard, zero-shot, seeds, ablation."""
