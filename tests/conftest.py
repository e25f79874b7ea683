"""Settings shared by every test: hypothesis draws the same examples each time and shows a failing one whole."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "slalom",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
settings.load_profile("slalom")
