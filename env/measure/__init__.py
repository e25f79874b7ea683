"""Measuring a policy in an environment: metrics of a run, statistics, goodput, points and their digests."""
