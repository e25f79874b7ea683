"""In front of engines that others wrote: ``route``, which hands them requests itself, and a router for Ray Serve, which
lets Ray do so. Both ask a policy through the scheduler of ``engine.remote``.
"""

from policies.route.command import Options, app, build, main

__all__ = ["Options", "app", "build", "main"]
