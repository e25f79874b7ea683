"""Matrix products whose weights are laid out for the CPU that multiplies by them.

A product of a few rows is bound by how weights are read. In the plain layout MKL spends as long on rearranging them
as on multiplying (2 to 32 rows), and reads them in short pieces (one row). Both are cured when the model is loaded:
several rows multiply by oneDNN's blocked layout, one row by the transpose. Measured on one core of a Xeon with
AVX-512, all products of SmolLM2-135M in fp32: 8 rows 138 -> 68 ms, one row 11 % less. The price is memory: the
weights are held twice.

oneDNN compiles code for every number of rows that it meets with a shape of weights, and keeps it: 0.55 MB each
(torch 2.13), up to 1024 of them. Batches and chunks have any number of rows, so it meets only those of a short list;
rows are added up to the next one (a step of SmolLM2-135M with one row more than a number of the list takes about 5 %
longer). MKL keeps nothing, and is as fast where rows are many.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Products of more rows than this are left to MKL. Measured as above, 128 to 512 rows: oneDNN 0.91 to 1.07 of its time.
_MOST_BLOCKED = 64


def can_pack(weight: Tensor) -> bool:
    """Whether :class:`Packed` takes ``weight``: fp32 on a CPU, and a torch that brings oneDNN."""
    has_operator = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
    return bool(has_operator and weight.device.type == "cpu" and weight.dtype == torch.float32)


def rows_computed(rows: int) -> int:
    """With how many rows a product of ``rows`` is computed: up to 8 as they are, up to 32 in twos, then in fours."""
    step = 1 if rows <= 8 else 2 if rows <= 32 else 4
    return rows if rows > _MOST_BLOCKED else -(-rows // step) * step


class Packed:
    """A weight [out, in] in the two layouts; multiplies as :func:`torch.nn.functional.linear` does."""

    def __init__(self, weight: Tensor) -> None:
        self._columns = weight.detach().t().contiguous()
        self._blocked: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.shape[0]
        if not 1 < rows <= _MOST_BLOCKED:
            return torch.mm(x, self._columns) if bias is None else torch.addmm(bias, x, self._columns)
        more = rows_computed(rows) - rows
        if more > 0:
            x = F.pad(x, (0, 0, 0, more))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._blocked, bias, "none", [], "")
        return out[:rows] if more > 0 else out


class Linear(nn.Linear):
    """:class:`torch.nn.Linear` of rows [T, in], which :meth:`pack` makes faster on a CPU."""

    _packed: Packed | None = None

    def pack(self) -> None:
        """Lay the weights out for this machine, where that is possible; the plain ones are let go."""
        if can_pack(self.weight):
            self._packed = Packed(self.weight)
            self.register_parameter("weight", None)

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is None:
            return F.linear(x, self.weight, self.bias)
        return self._packed(x, self.bias)
