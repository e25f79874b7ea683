"""Where keys and values live: one tensor a layer, cut into blocks of a fixed number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.model.config import ModelConfig


class KVPool:
    """KV blocks of one device. Which sequence owns a block is somebody else's business.

    :param config: the model whose KV it holds
    :param blocks: number of blocks; ids run from 0 to ``blocks - 1``
    :param block_tokens: tokens of one block
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        blocks: int,
        block_tokens: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        assert blocks > 0
        assert block_tokens > 0
        self.blocks, self.block_tokens = blocks, block_tokens
        self.block_bytes = block_tokens * config.kv_elements_per_token * dtype.itemsize
        shape = (2, blocks, block_tokens, config.n_kv_heads, config.head_dim)
        # zeros, not empty: a garbage NaN times a softmax weight of zero would still be NaN
        self.layers: list[Tensor] = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]

    def copy_from(self, source: KVPool, source_blocks: Sequence[int], blocks: Sequence[int]) -> None:
        """Copy ``source_blocks`` of ``source`` (may be this pool) into ``blocks``, pairwise, all layers.

        Both pools must hold the same model's KV in blocks of the same size. It has happened when this returns:
        whoever reads next does so on a stream of its own.
        """
        assert len(source_blocks) == len(blocks), "a block has no partner"
        assert self.block_bytes == source.block_bytes, "pools of different shape"
        if not blocks:
            return
        device, origin = self.layers[0].device, source.layers[0].device
        into = torch.tensor(blocks, dtype=torch.int64, device=device)
        out_of = torch.tensor(source_blocks, dtype=torch.int64, device=origin)
        for target, layer in zip(self.layers, source.layers, strict=True):
            target.index_copy_(1, into, layer.index_select(1, out_of).to(device, non_blocking=True))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
