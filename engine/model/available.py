"""Whether a device that was asked for is there: said before anything is loaded."""

from __future__ import annotations

import torch

from engine.errors import SlalomError

__all__ = ["check_device"]


def check_device(name: str) -> None:
    """:param name: ``cpu``, ``cuda`` or ``cuda:N``

    :raises SlalomError: no such device on this machine
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SlalomError("--device", name, "use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise SlalomError("--device", name, "use cpu or cuda")
    if device.type == "cuda":
        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if n == 0:
            raise SlalomError("--device", name, "torch finds no CUDA device here; use cpu, or see nvidia-smi")
        if (device.index or 0) >= n:
            raise SlalomError("--device", name, f"there are {n} CUDA devices, numbered from 0")
