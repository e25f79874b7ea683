"""Device code: what a forward pass needs beyond matrix products. Nothing here knows a request or a model.

`base` is the contract, `reference` answers it with torch (what a CPU runs), `triton_backend` with Triton
kernels (what a GPU runs); :func:`make_kernels` picks one by name. `batch` describes one forward pass, flat.
"""

from __future__ import annotations

from engine.kernels.base import Kernels
from engine.kernels.batch import Batch, Scored, Span, Spans
from engine.kernels.registry import KERNELS, make_kernels

__all__ = ["KERNELS", "Batch", "Kernels", "Scored", "Span", "Spans", "make_kernels"]
