"""Latency profiles: what a step of prefill or decode costs on a device, as data and as compiled functions.

``profile.py`` is the file format, ``evaluate.py`` what the core and the surrogate compute with, ``fit.py``
makes profiles from measurements, ``published.py`` from published numbers. Nothing here measures or schedules.
"""

from __future__ import annotations

from engine.latency.profile import FitError, Profile, Provenance, Roofline, Share, list_profiles, pack

__all__ = ["FitError", "Profile", "Provenance", "Roofline", "Share", "list_profiles", "pack"]
