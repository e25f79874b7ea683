"""Latency profiles: what a step of prefill or decode costs on a device, as data and as compiled functions.

``profile.py`` is the file format, ``evaluate.py`` what the core and the surrogate compute with, ``fit.py``
makes profiles from measurements, ``published.py`` from published numbers. Nothing here measures or schedules.
The engine needs ``evaluate`` only, so what the file format needs (pydantic) is imported when a name of it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.latency.profile import FitError, Profile, Provenance, Roofline, Share, list_profiles, pack

__all__ = ["FitError", "Profile", "Provenance", "Roofline", "Share", "list_profiles", "pack"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from engine.latency import profile

    return getattr(profile, name)
