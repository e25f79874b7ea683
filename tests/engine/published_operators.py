"""Whole-model samples from published per-operator tables: a profile without a GPU.

A step is the sum over layers of its kernels, plus the output head, read once at the memory's usual
efficiency. Host time between kernels is not in such tables (CUDA graphs hide most of it in decode).
Sources: microsoft/vidur ``mlp.csv`` (milliseconds per operator and token count), AISimulate attention
tables (milliseconds per layer by batch size and length), LLMServingSim layers (nanoseconds).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.latency.fit import DecodeSamples, PrefillSamples

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["attention_table", "layers_linear_s", "operator_samples", "vidur_linear_s"]

#: Part of the memory bandwidth that kernels reach (AISimulate's own correction for A100 and H100).
BANDWIDTH_REACHED = 0.8
ELEMENTWISE = ("input_layernorm", "attn_rope", "post_attention_layernorm", "mlp_act", "add")
LINEAR = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")


def vidur_linear_s(path: Path, operators: tuple[str, ...] = LINEAR + ELEMENTWISE) -> pd.Series:
    """Seconds of one layer without attention on one device, by token count (Vidur ``mlp.csv``)."""
    import pandas as pd

    table = pd.read_csv(path)
    table = table[table.num_tensor_parallel_workers == 1]
    columns = [f"time_stats.{name}.median" for name in operators]
    return table.groupby("num_tokens")[columns].mean().sum(axis=1) * 1e-3


def layers_linear_s(path: Path) -> pd.Series:
    """Seconds of one layer's matrix products on one device, by token count (LLMServingSim layers)."""
    import pandas as pd

    table = pd.read_csv(path)
    products = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    table = table[table.layer_name.isin(products)]
    return table.groupby("input")["latency(ns)"].sum() * 1e-9


def attention_table(path: Path, heads: int, kv_heads: int, head_dim: int) -> pd.DataFrame:
    """Rows of an AISimulate attention table for one shape, 16-bit cache, full window (needs pyarrow)."""
    import pandas as pd

    table = pd.read_parquet(path)
    shape = (table.num_heads == heads) & (table.num_key_value_heads == kv_heads) & (table.head_dim == head_dim)
    plain = table.kv_cache_dtype == "bfloat16"
    if "window_size" in table:
        plain &= table.window_size == 0
    return table[shape & plain]


def operator_samples(
    linear_s: pd.Series,
    context: pd.DataFrame,
    generation: pd.DataFrame,
    *,
    n_layers: int,
    head_bytes: float,
    memory_bytes_per_s: float,
    max_tokens: int = 16384,
    max_batch: int = 256,
) -> tuple[PrefillSamples, DecodeSamples]:
    """Prefill and decode samples as sums of kernels.

    :param linear_s: seconds of one layer without attention, by token count; extended in proportion
    :param context: prefill attention, columns ``batch_size, isl, latency`` (ms)
    :param generation: decode attention, columns ``batch_size, step, latency`` (ms)
    :param head_bytes: bytes of the output head
    :param max_tokens: tokens in a prefill step at most
    """
    head_s = head_bytes / (BANDWIDTH_REACHED * memory_bytes_per_s)

    def linear(tokens: np.ndarray) -> np.ndarray:
        inside = np.interp(tokens, linear_s.index, linear_s.to_numpy())
        return inside * np.maximum(tokens / linear_s.index.max(), 1.0)

    pre = context[(context.isl >= 64) & (context.isl * context.batch_size <= max_tokens)]
    n, bs = pre.isl.to_numpy(), pre.batch_size.to_numpy()
    seconds = n_layers * (linear(n * bs) + pre.latency.to_numpy() * 1e-3) + head_s
    prefill = PrefillSamples(n=n, r=np.zeros_like(n), seconds=seconds, bs=bs)

    gen = generation[(generation.step >= 31) & (generation.batch_size <= max_batch)]
    bs = gen.batch_size.to_numpy()
    seconds = n_layers * (linear(bs) + gen.latency.to_numpy() * 1e-3) + head_s
    return prefill, DecodeSamples(sum_ctx=bs * gen.step.to_numpy(), bs=bs, seconds=seconds)
