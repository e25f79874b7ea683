"""Measure policies: metrics of a run, goodput search, paired comparison, tuning of rules, report, benchmarks.

Only this floor aggregates results; it drives ``env.surrogate.simulate`` and never reaches into the core.
Importing it is cheap on purpose: optuna and matplotlib are loaded by the functions that need them.
"""
