"""Many small arrays on a device by one copy: they lie in one buffer, each at an address that kernels like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

#: Bytes. Triton compiles a kernel anew for a pointer that is not a multiple of 16.
_ALIGNMENT = 16


def offsets(sizes: Sequence[int]) -> list[int]:
    """Where arrays of so many bytes begin in one buffer, and, last, how long it must be."""
    found = [0]
    for size in sizes:
        found.append(found[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return found


def view(buffer: Tensor, offset: int, like: np.ndarray) -> Tensor:
    """The part of ``buffer`` (bytes) at ``offset`` that an array of the type and shape of ``like`` takes."""
    kind = torch.from_numpy(like).dtype
    return buffer[offset : offset + like.nbytes].view(kind).view(like.shape)


def upload(arrays: Sequence[np.ndarray], device: torch.device | str) -> list[Tensor]:
    """``arrays`` on ``device``, by one copy from pinned memory that the host does not wait for. A CPU shares them."""
    if torch.device(device).type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    at = offsets([array.nbytes for array in arrays])
    host = torch.empty(at[-1], dtype=torch.uint8, pin_memory=torch.device(device).type == "cuda")
    for array, offset in zip(arrays, at, strict=False):
        view(host, offset, array).numpy()[...] = array
    buffer = host.to(device, non_blocking=True)
    return [view(buffer, offset, array) for array, offset in zip(arrays, at, strict=False)]
