"""What a Llama-family checkpoint says about itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import SlalomError

#: ``model_type`` of Hugging Face configs that this model code computes.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def whole_number(field: str, value: Any) -> int:
    """:raises SlalomError: no whole number from 1 to 2^31"""
    if type(value) is not int or not 0 < value < 2**31:
        raise SlalomError(field, value, "give a whole number, 1 or more and below 2^31; or fetch the model again")
    return value


def number_of(field: str, value: Any) -> float:
    """:raises SlalomError: no number above 0"""
    if type(value) not in (int, float) or not 0 < value < 1e15:
        raise SlalomError(field, value, "give a number above 0; or fetch the model again")
    return float(value)


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Stretching of rotary wavelengths for contexts longer than those trained on.

    ``linear`` divides every frequency by ``factor``; ``llama3`` leaves wavelengths below
    ``original / high`` alone, divides those above ``original / low`` and blends between (Llama 3.1).
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def apply(self, frequencies: Tensor) -> Tensor:
        if self.kind == "linear":
            return frequencies / self.factor
        turns = self.original * frequencies / (2 * math.pi)  # turns within the original context
        blend = ((turns - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
        return frequencies * (blend + (1.0 - blend) / self.factor)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of the transformer. Lengths are tokens, widths are elements."""

    vocab: int
    width: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn: int
    max_tokens: int
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    qk_norm: bool = False
    qkv_bias: bool = False
    tied: bool = False

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads or self.head_dim % 2:
            shape = f"{self.n_heads} heads of {self.head_dim}, {self.n_kv_heads} of keys"
            raise SlalomError("model", shape, "heads are a multiple of key heads, and of even width: fetch it again")

    @property
    def kv_elements_per_token(self) -> int:
        """Keys and values of one token over all layers."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim

    def rope_frequencies(self) -> Tensor:
        """Radians per token for each pair of a head, float32 [head_dim / 2]."""
        powers = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        frequencies = 1.0 / (self.rope_base**powers)
        return frequencies if self.rope_scaling is None else self.rope_scaling.apply(frequencies)

    @classmethod
    def from_hf(cls, raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Read a Hugging Face ``config.json``.

        A sliding window is honoured by refusing contexts beyond it, where it equals full attention.

        :raises SlalomError: another family, or a feature that would silently change the result
        """

        def need(key: str) -> Any:
            if raw.get(key) is None:
                raise SlalomError(f"{where}: {key}", None, "the file is not a complete model config")
            return raw[key]

        def whole(key: str, given: Any = None) -> int:
            return whole_number(f"{where}: {key}", need(key) if given is None else given)

        def refuse(key: str, fix: str) -> None:
            if raw.get(key):
                raise SlalomError(f"{where}: {key}", raw[key], fix)

        if not isinstance(raw, dict):
            raise SlalomError(where, raw, "the file is no model config")
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise SlalomError(f"{where}: model_type", family, f"supported families: {', '.join(FAMILIES)}")
        if raw.get("hidden_act", "silu") != "silu":
            raise SlalomError(f"{where}: hidden_act", raw["hidden_act"], "only silu is supported")
        refuse("quantization_config", "use an unquantised checkpoint, or a GGUF file")
        refuse("attention_bias", "biases on the attention output are not supported")
        refuse("mlp_bias", "biases in the feed-forward block are not supported")
        rope_base, scaling = _rope(raw, where)
        max_tokens = whole("max_position_embeddings")
        if raw.get("sliding_window") and raw.get("use_sliding_window", True):
            max_tokens = min(max_tokens, whole("sliding_window"))
        width, n_heads = whole("hidden_size"), whole("num_attention_heads")
        return cls(
            vocab=whole("vocab_size"),
            width=width,
            n_layers=whole("num_hidden_layers"),
            n_heads=n_heads,
            n_kv_heads=whole("num_key_value_heads", raw.get("num_key_value_heads") or n_heads),
            head_dim=whole("head_dim", raw.get("head_dim") or width // n_heads),
            ffn=whole("intermediate_size"),
            max_tokens=max_tokens,
            rope_base=rope_base,
            rope_scaling=scaling,
            norm_eps=number_of(f"{where}: rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
            qk_norm=family == "qwen3",
            qkv_bias=family == "qwen2",
            tied=bool(raw.get("tie_word_embeddings", False)),
        )


def _rope(raw: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from ``rope_parameters`` (newer files) or ``rope_theta`` and ``rope_scaling``."""
    found = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise SlalomError(f"{where}: rope_scaling", found, "the file is not a complete model config")

    def number(key: str) -> float:
        return number_of(f"{where}: rope_scaling.{key}", found.get(key))

    base = number_of(f"{where}: rope_theta", found.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind == "default":
        return base, None
    if kind == "linear":
        return base, RopeScaling("linear", number("factor"))
    if kind == "llama3":
        return base, RopeScaling(
            "llama3",
            number("factor"),
            number("low_freq_factor"),
            number("high_freq_factor"),
            int(number("original_max_position_embeddings")),
        )
    raise SlalomError(f"{where}: rope_scaling", kind, "supported: default, linear, llama3")


_LLAMA3 = RopeScaling("llama3", 8.0)

#: Shapes that ``dummy:NAME`` fills with random weights, for timing. The larger two are Llama 3.1's.
DUMMY_SHAPES = {
    "tiny": ModelConfig(
        vocab=512, width=64, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=16, ffn=128, max_tokens=4096,
        tied=True,
    ),
    "llama-8b": ModelConfig(
        vocab=128256, width=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, ffn=14336,
        max_tokens=131072, rope_base=500000.0, rope_scaling=_LLAMA3,
    ),
    "llama-70b": ModelConfig(
        vocab=128256, width=8192, n_layers=80, n_heads=64, n_kv_heads=8, head_dim=128, ffn=28672,
        max_tokens=131072, rope_base=500000.0, rope_scaling=_LLAMA3,
    ),
}  # fmt: skip
