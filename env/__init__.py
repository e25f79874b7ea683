"""Where policies practise: scenarios, workloads, the surrogate and the gymnasium environments around it.

Nothing here decides (``policies``), learns (``train``) or judges (``eval``).
"""

from __future__ import annotations

from gymnasium.envs.registration import register, registry

__all__: list[str] = []

if "slalom/Dispatch-v0" not in registry:
    register(id="slalom/Dispatch-v0", entry_point="env.gym.dispatch_env:DispatchEnv")
