"""Which device and which number format a model runs with: one default for every command that loads one."""

from __future__ import annotations

import os
from typing import Any

from engine.errors import SlalomError

DTYPES = ("float32", "bfloat16", "float16")
#: Hardware queues. With the usual 8, replays of one stream wait behind what was launched on others (pytorch#176582).
_CONNECTIONS = ("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def choose_device(name: str) -> str:
    """The device that is meant, ``auto`` being CUDA where there is one and else the CPU; checked before loading.

    Prepares the process for it, so it comes before CUDA is used.

    :param name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``
    :raises SlalomError: a device that this machine does not have
    """
    import torch

    os.environ.setdefault(*_CONNECTIONS)
    fix = "use auto, cpu, cuda or cuda:N"
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SlalomError("--device", name, fix) from error
    if device.type not in ("cpu", "cuda"):
        raise SlalomError("--device", name, fix)
    if device.type == "cuda":
        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if n == 0:
            raise SlalomError("--device", name, "torch finds no CUDA device here; use auto or cpu, or see nvidia-smi")
        if (device.index or 0) >= n:
            raise SlalomError("--device", name, f"there are {n} CUDA devices, numbered from 0")
    return name


def choose_dtype(name: str, device: str) -> Any:
    """The number format that is meant, ``auto`` being bfloat16 on a GPU and float32 on a CPU.

    :raises SlalomError: another name
    """
    import torch

    if name == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if name not in DTYPES:
        raise SlalomError("--dtype", name, f"use auto, {', '.join(DTYPES)}")
    return getattr(torch, name)


def where(model: str, device: str, dtype: Any) -> str:
    """What a command says first: the model, its number format and its device."""
    return f"{model} in {str(dtype).removeprefix('torch.')} on {device}"
