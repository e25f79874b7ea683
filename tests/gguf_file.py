"""GGUF files made by hand, byte by byte."""

from __future__ import annotations

import math
import struct
from typing import Any

F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q6_K, BF16 = 0, 1, 2, 3, 6, 7, 8, 12, 14, 30


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def metadata_value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + string(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, list) and isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value))
    if isinstance(value, list):
        return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    return struct.pack("<II", 4, value)


def gguf(
    metadata: dict[str, Any],
    tensors: dict[str, tuple[tuple[int, ...], int, bytes]],
    *,
    magic: bytes = b"GGUF",
) -> bytes:
    """A file of the given metadata and tensors (shape in torch's order, type, data), aligned to 32 bytes."""
    head = magic + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += string(key) + metadata_value(value)
    body = b""
    for name, (shape, kind, data) in tensors.items():
        head += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", kind, len(body))
        body += data + b"\0" * (-len(data) % 32)
    return head + b"\0" * (-len(head) % 32) + body


def small_model() -> bytes:
    """A model of one layer with a byte-level vocabulary; its weights are zero."""
    words = [*(chr(code) for code in range(0x21, 0x7F)), "ab", "<|end|>"]
    metadata = {
        "general.architecture": "llama", "llama.embedding_length": 8, "llama.block_count": 1,
        "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1, "llama.feed_forward_length": 8,
        "llama.context_length": 32, "llama.rope.freq_base": 10000.0, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.token_type": [1] * (len(words) - 1) + [3],
        "tokenizer.ggml.eos_token_id": len(words) - 1, "tokenizer.ggml.bos_token_id": len(words) - 1,
        "tokenizer.ggml.add_bos_token": 1, "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    shapes = {"token_embd": (len(words), 8), "output_norm": (8,), "blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8)}
    tensors = {f"{n}.weight": (shape, F32, b"\0" * 4 * math.prod(shape)) for n, shape in shapes.items()}
    return gguf(metadata, tensors)
