"""From a running engine to its latency profile: what is measured, where next, and what is made of it.

`points` says what a measurement is and keeps it, `bench` takes it, `design` chooses the next one, `live` measures
what only a whole engine shows (host time, transfers, role changes, neighbours), `assemble` fits and draws.
"""

from __future__ import annotations

from engine.calibration.assemble import Calibration, assemble
from engine.calibration.bench import Bench
from engine.calibration.campaign import Campaign, Limits
from engine.calibration.points import Measured, Point, Store

__all__ = ["Bench", "Calibration", "Campaign", "Limits", "Measured", "Point", "Store", "assemble"]
