"""How long to train: wall time or frames, as written on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.errors import SlalomError

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_FRAMES = {"": 1, "k": 1_000, "M": 1_000_000}
#: Fewer tell nothing: a bare small number is a time whose unit was forgotten.
_FEWEST = 1_000
_FIX = "write a time (90s, 2m, 1h), or a number of simulated requests (500k, 2M)"


@dataclass(frozen=True)
class Budget:
    """Exactly one of the two is finite.

    :param seconds: wall time, not counting the compilation of kernels
    :param frames: decisions learned from (PPO), or requests simulated (search)
    """

    seconds: float = float("inf")
    frames: int | None = None

    def __str__(self) -> str:
        return f"{self.seconds:g}s" if self.frames is None else str(self.frames)


def parse_budget(text: str) -> Budget:
    """``90s``, ``2m``, ``1.5h`` are time; ``500k``, ``2M``, ``100000`` are frames.

    :raises SlalomError: anything else, or too little to learn from
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhkM]?)", text.strip())
    if found is None or float(found[1]) <= 0:
        raise SlalomError("--budget", text, _FIX)
    amount, unit = float(found[1]), found[2]
    if unit in _SECONDS:
        return Budget(seconds=amount * _SECONDS[unit])
    frames = round(amount * _FRAMES[unit])
    if frames < _FEWEST:
        raise SlalomError("--budget", text, f"that is less than {_FEWEST} requests; {_FIX}")
    return Budget(frames=frames)
