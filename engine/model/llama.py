"""The Llama family (Llama, Mistral, Qwen2, Qwen3, SmolLM2) over a paged KV cache, top down.

:meth:`Llama.forward` runs any range of layers over a flat :class:`Batch`, so decode, chunked prefill, mixed
batches and layer slices are one code path. It keeps no state between calls: two lanes may run it at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.kernels import Batch, Kernels
from engine.model.config import ModelConfig
from engine.model.kv import KVPool
from engine.model.linear import Linear, Packed, can_pack

#: A model of more parameters than this keeps its weights once, as they are.
_MOST_PACKED = 10**9


@dataclass(frozen=True, slots=True)
class Carry:
    """What one layer hands to the next, and a layer slice to the slice after it. T rows."""

    hidden: Tensor  # [T, width]: output of the last block, not yet added
    residual: Tensor | None  # [T, width]: the stream it belongs to; None before the first layer
    next_layer: int


class Llama(nn.Module):
    """:param kernels: the device operations, see :class:`engine.kernels.Kernels`"""

    frequencies: Tensor
    _tied: Packed | None = None

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.embed = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Layer(config, kernels) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.width, config.norm_eps, kernels)
        self.head = None if config.tied else Linear(config.width, config.vocab, bias=False)
        self.register_buffer("frequencies", torch.empty(config.head_dim // 2, dtype=torch.float32))

    @torch.inference_mode()
    def forward(
        self, batch: Batch, kv: KVPool, layers: tuple[int, int] | None = None, carry: Carry | None = None
    ) -> Carry:
        """Run layers ``[from, to)`` (all by default), writing their KV; pass on what comes out.

        ``carry`` is what the slice before returned for the same batch, and None for a slice from layer 0.
        """
        first, end = layers or (0, self.config.n_layers)
        assert 0 <= first < end <= self.config.n_layers, f"no layers [{first}, {end})"
        assert first == (carry.next_layer if carry else 0), "slices must follow each other"
        hidden, residual = (carry.hidden, carry.residual) if carry else (self.embed(batch.tokens), None)
        angles = batch.positions.unsqueeze(1) * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        for index in range(first, end):
            hidden, residual = self.layers[index](hidden, residual, batch, kv.layers[index], cos, sin)
        return Carry(hidden, residual, end)

    @torch.inference_mode()
    def logits(self, carry: Carry, batch: Batch) -> Tensor:
        """Logits of the rows that sample [R, vocab], from what the last layer returned."""
        assert carry.next_layer == self.config.n_layers, "layers are left to run"
        assert carry.residual is not None
        rows = batch.sample_rows
        hidden, _ = self.norm(carry.hidden[rows], carry.residual[rows])
        if self.head is not None:
            return self.head(hidden)
        return F.linear(hidden, self.embed.weight) if self._tied is None else self._tied(hidden)

    def pack(self) -> None:
        """Lay the weights out for the CPU they are on (``linear``); nothing happens on a GPU, or to a large model."""
        if sum(p.numel() for p in self.parameters()) > _MOST_PACKED:
            return
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
        if self.head is None and can_pack(self.embed.weight):
            self._tied = Packed(self.embed.weight)  # the embedding itself stays: rows are read from it


class Layer(nn.Module):
    """Attention, then feed-forward, each on the normalised residual stream."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps, kernels)
        self.attention = Attention(config, kernels)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps, kernels)
        self.ffn = FeedForward(config, kernels)

    def forward(
        self, hidden: Tensor, residual: Tensor | None, batch: Batch, cache: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden, residual = self.attention_norm(hidden, residual)
        hidden = self.attention(hidden, batch, cache, cos, sin)
        hidden, residual = self.ffn_norm(hidden, residual)
        return self.ffn(hidden), residual


class Attention(nn.Module):
    """Grouped-query attention; query, key and value come from one product."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        self.head_dim = config.head_dim
        self.qkv = Linear(config.width, sum(self.heads) * config.head_dim, bias=config.qkv_bias)
        self.out = Linear(config.n_heads * config.head_dim, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, kernels) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, kernels) if config.qk_norm else None

    def forward(self, x: Tensor, batch: Batch, cache: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        packed = self.qkv(x).view(x.shape[0], sum(self.heads), self.head_dim)
        query, key, value = packed.split(self.heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query)[0], self.k_norm(key)[0]
        self.kernels.rope_write(query, key, value, cos, sin, cache, batch.slots)
        mixed = self.kernels.attend(query, cache, batch, self.head_dim**-0.5)
        return self.out(mixed.flatten(1))


class FeedForward(nn.Module):
    """SwiGLU; gate and up come from one product."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_up = Linear(config.width, 2 * config.ffn, bias=False)
        self.down = Linear(config.ffn, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.kernels.silu_mul(self.gate_up(x)))


class RMSNorm(nn.Module):
    """Adds the residual, if any, then normalises; returns both (:meth:`Kernels.rms_norm`)."""

    def __init__(self, width: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.kernels = eps, kernels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.kernels.rms_norm(x, self.weight, self.eps, residual)
