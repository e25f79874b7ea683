"""Which kernels run: chosen by name, refused aloud where they cannot."""

from __future__ import annotations

import importlib.util
import os

import torch

from engine.errors import SlalomError
from engine.kernels.base import Kernels

#: Names a user may choose. ``auto`` is Triton on a CUDA device and the compiled ones on a CPU, nothing else: FlashInfer
#: has not been measured, on a whole device or on a partition.
KERNELS = ("auto", "compiled", "flashinfer", "torch", "triton")


def make_kernels(name: str, device: torch.device | str) -> Kernels:
    """The kernels called ``name`` for ``device``.

    :raises SlalomError: unknown name, or kernels that are not installed or cannot run here
    """
    kind = torch.device(device).type
    if name not in KERNELS:
        raise SlalomError("kernels", name, f"choose one of {', '.join(KERNELS)}")
    if name == "auto":
        name = "compiled" if kind == "cpu" else "triton"
    if name == "compiled":
        if kind != "cpu":
            raise SlalomError("kernels", f"compiled on {kind}", "choose 'triton' or 'torch'")
        from engine.kernels.compiled import CompiledKernels

        return CompiledKernels()
    if name == "torch":
        from engine.kernels.reference import TorchKernels

        return TorchKernels()
    if importlib.util.find_spec("triton") is None:
        raise SlalomError("kernels", name, "install triton, or choose kernels 'torch'")
    if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SlalomError(
            "kernels", f"{name} on {kind}", "choose 'torch', or set TRITON_INTERPRET=1 for its interpreter"
        )
    if name == "flashinfer":
        if importlib.util.find_spec("flashinfer") is None:
            raise SlalomError("kernels", name, "install it first: pip install 'slalom[flashinfer]'")
        from engine.kernels.flashinfer_backend import FlashInferKernels

        return FlashInferKernels()
    from engine.kernels.triton_backend import TritonKernels

    return TritonKernels()
