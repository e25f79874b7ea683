"""The contract of a kernel back end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from engine.kernels.batch import Batch
from engine.kernels.work import Tiling


class Kernels(ABC):
    """Four operations. T rows, H query heads, K KV heads (K divides H), D head width.

    ``cache`` is one layer's KV, ``[2, blocks, block_tokens, K, D]`` contiguous: 0 holds keys, 1 values.
    Query heads ``g * H / K … (g + 1) * H / K - 1`` read KV head ``g``. Inputs may be strided views as long
    as their last axis is contiguous. An implementation keeps no state between calls, so that two lanes may
    use one object at once, and never reads a tensor back to the host unless it says so.
    """

    name: ClassVar[str]
    #: Whether what a pass launches depends on nothing but its shapes, so that it can be captured in a graph.
    replayable: ClassVar[bool] = False
    #: Passes of a sequence with so many rows meet every variant that serving needs.
    warm_rows: ClassVar[tuple[int, ...]] = (1, 2, 4, 8, 16, 32, 64, 128)

    def tiling(self, max_query: int, heads: tuple[int, int, int], element_bytes: int, sm_count: int) -> Tiling | None:
        """How :meth:`attend` cuts a pass whose longest sequence has ``max_query`` rows; None: it keeps no work list.

        :param heads: H, K and D
        """
        return None

    @abstractmethod
    def attend(self, query: Tensor, cache: Tensor, batch: Batch, scale: float) -> Tensor:
        """Causal attention of ``query`` [T, H, D] over each sequence's context in ``cache`` -> [T, H, D].

        Row i of a sequence with n rows and context c sees its first ``c - n + i + 1`` tokens, whose KV (this
        pass's own included) must have been written.
        """

    @abstractmethod
    def rope_write(
        self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor
    ) -> None:
        """Rotate ``query`` [T, H, D] in place; store rotated ``key`` [T, K, D] and ``value`` at their slots.

        :param slots: flat tokens of ``cache`` [T]; rows below 0 are skipped

        Angles are ``cos``/``sin`` fp32 [T, D / 2]; element i of a head pairs with element i + D / 2. What ``key``
        holds afterwards is left open.
        """

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalise the last axis of ``x`` [T, D] or [T, H, D], after adding ``residual`` (2-D only).

        Returns the normalised rows and what was normalised: ``x`` itself or ``x + residual``.
        """

    @abstractmethod
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) * up`` of ``gate_up`` [T, 2 F], gate first -> [T, F]."""
