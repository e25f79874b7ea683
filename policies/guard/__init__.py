"""The guard around a policy in the live engine: whatever a policy does, the service goes on.

``guard`` has the order of things; ``config`` every dial; ``checks``, ``worker``, ``breaker``, ``roles`` and ``drift``
one trigger each; ``snapshot`` what a decision reads of a policy; ``outcomes`` what became of it.
"""

from __future__ import annotations

from policies.guard.config import GuardConfig
from policies.guard.guard import Guard

__all__ = ["Guard", "GuardConfig"]
