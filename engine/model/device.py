"""Which device and which number format a model runs with when the user leaves it open."""

from __future__ import annotations

from typing import Any

from engine.errors import SlalomError

__all__ = ["choose_device", "choose_dtype"]


def choose_device(device: str) -> str:
    """``auto`` as CUDA where there is one, else the CPU.

    :raises SlalomError: a device this machine does not have
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise SlalomError("--device", device, "use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise SlalomError("--device", device, "this machine has no CUDA device; use auto or cpu")
    return device


def choose_dtype(dtype: str, device: str) -> Any:
    """``auto`` as bfloat16 on a GPU and on a CPU with matrix units for it, else float32."""
    import torch

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        fast = device == "cuda" or bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
        return torch.bfloat16 if fast else torch.float32
    if dtype not in kinds:
        raise SlalomError("--dtype", dtype, f"use auto, {', '.join(kinds)}")
    return kinds[dtype]
