"""Reader of GGUF files (version 2 and 3, little-endian): metadata, tensor table, dequantisation.

Layouts follow the format's specification and ggml's block structures. The file is mapped, never read whole;
every offset is checked against its end before use, since such files often arrive cut short.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.common.regular import check_regular
from engine.errors import SlalomError

__all__ = ["GGUFFile", "TensorInfo"]

_CUT = "the file is damaged or cut short; fetch it again"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"} | {
    10: "<Q", 11: "<q", 12: "<d"
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One row of the tensor table; ``shape`` is in torch's order (the file stores it reversed)."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int  # bytes from the start of the file
    size: int  # bytes


class GGUFFile:
    """An open GGUF file: ``metadata``, ``tensors`` by name, :meth:`load`.

    :raises SlalomError: not GGUF, another version, damaged, or a tensor type that is not supported
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        check_regular(path, 2**50)  # mapped, not read
        try:
            with self.path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise SlalomError("model", str(path), f"cannot open it as a GGUF file ({error})") from error
        reader = _Reader(self._data, str(path))
        magic, version = reader.take(4), reader.scalar(4)
        if magic != b"GGUF":
            raise SlalomError(f"{path}: magic", magic, "this is not a GGUF file")
        if version not in (2, 3):
            raise SlalomError(f"{path}: version", version, "GGUF 2 and 3 (little-endian) are supported")
        n_tensors, n_metadata = reader.scalar(10), reader.scalar(10)
        self.metadata: dict[str, Any] = {}
        for _ in range(n_metadata):
            key = reader.string()
            self.metadata[key] = reader.value(reader.scalar(4))
        rows = [_tensor_row(reader) for _ in range(n_tensors)]
        alignment = int(self.metadata.get("general.alignment", 32))
        if alignment <= 0:
            raise SlalomError(f"{path}: general.alignment", alignment, _CUT)
        start = -(-reader.at // alignment) * alignment
        self.tensors = {name: self._locate(name, shape, kind, start + at) for name, shape, kind, at in rows}

    def _locate(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        if kind not in _FORMATS:
            known = ", ".join(f.name for f in _FORMATS.values())
            raise SlalomError(f"{self.path}: {name}: tensor type", kind, f"supported: {known}")
        form = _FORMATS[kind]
        elements = math.prod(shape)
        size = elements // form.elements * form.bytes
        if not shape or shape[-1] % form.elements or offset + size > len(self._data):
            raise SlalomError(f"{self.path}: {name}: shape", shape, _CUT)
        return TensorInfo(name, shape, kind, offset, size)

    def load(self, name: str) -> np.ndarray:
        """The tensor as float32 (a fresh, writable array), dequantised.

        :raises SlalomError: no tensor of that name
        """
        info = self.tensors.get(name)
        if info is None:
            raise SlalomError(f"{self.path}: tensor", name, "the file lacks it; is it a whole Llama-family model?")
        form = _FORMATS[info.kind]
        raw = np.frombuffer(self._data, dtype=np.uint8, count=info.size, offset=info.offset)
        return form.decode(raw.reshape(-1, form.bytes)).reshape(info.shape)


class _Reader:
    """A cursor that refuses to pass the end."""

    def __init__(self, data: mmap.mmap, path: str) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise SlalomError(f"{self.path}: byte {self.at}", f"{count} bytes announced", _CUT)
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, kind: int) -> Any:
        form = _SCALARS[kind]
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        return self.take(self.scalar(10)).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(self.scalar(4), self.scalar(10))
        if kind not in _SCALARS:
            raise SlalomError(f"{self.path}: byte {self.at}: value type", kind, _CUT)
        return self.scalar(kind)

    def _array(self, kind: int, count: int) -> list[Any]:
        if kind in _SCALARS:
            form = _SCALARS[kind]
            raw = self.take(count * struct.calcsize(form))
            return list(struct.unpack(f"<{count}{form[1]}", raw))
        if kind != _STRING or count > len(self.data):
            raise SlalomError(f"{self.path}: byte {self.at}: array", (kind, count), _CUT)
        return [self.string() for _ in range(count)]


def _tensor_row(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name, n_dims = reader.string(), reader.scalar(4)
    if n_dims > 4:
        raise SlalomError(f"{reader.path}: {name}: dimensions", n_dims, _CUT)
    shape = tuple(reader.scalar(10) for _ in range(n_dims))[::-1]
    return name, shape, reader.scalar(4), reader.scalar(10)


# -- block formats: raw bytes [blocks, bytes a block] -> float32 [blocks, elements a block]


def _half(raw: np.ndarray) -> np.ndarray:
    return raw.copy().view(np.float16).astype(np.float32)


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """Low halves of the bytes, then their high halves."""
    return np.concatenate((raw & 15, raw >> 4), axis=1)


def _fifth_bits(raw: np.ndarray) -> np.ndarray:
    """Bit i of a 32-bit word, moved to value 16, for i = 0 … 31."""
    word = raw.copy().view(np.uint32)
    return ((word >> np.arange(32, dtype=np.uint32)) & 1).astype(np.uint8) << 4


def _f32(raw: np.ndarray) -> np.ndarray:
    return raw.copy().view(np.float32)


def _bf16(raw: np.ndarray) -> np.ndarray:
    return (raw.copy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _q4_0(raw: np.ndarray) -> np.ndarray:
    return (_nibbles(raw[:, 2:]).astype(np.float32) - 8) * _half(raw[:, :2])


def _q4_1(raw: np.ndarray) -> np.ndarray:
    values = _nibbles(raw[:, 4:]).astype(np.float32)
    values *= _half(raw[:, :2])
    values += _half(raw[:, 2:4])
    return values


def _q5_0(raw: np.ndarray) -> np.ndarray:
    quants = _nibbles(raw[:, 6:]) | _fifth_bits(raw[:, 2:6])
    return (quants.astype(np.float32) - 16) * _half(raw[:, :2])


def _q5_1(raw: np.ndarray) -> np.ndarray:
    return (_nibbles(raw[:, 8:]) | _fifth_bits(raw[:, 4:8])) * _half(raw[:, :2]) + _half(raw[:, 2:4])


def _q8_0(raw: np.ndarray) -> np.ndarray:
    return raw[:, 2:].view(np.int8) * _half(raw[:, :2])


def _q4_k(raw: np.ndarray) -> np.ndarray:
    """8 groups of 32; 6-bit scales and minima share 12 bytes, the last four of each with split bits."""
    low, mid, high = np.split(raw[:, 4:16], 3, axis=1)
    scales = np.concatenate((low & 63, (high & 15) | ((low >> 2) & 48)), axis=1)
    minima = np.concatenate((mid & 63, (high >> 4) | ((mid >> 2) & 48)), axis=1)
    pairs = raw[:, 16:].reshape(-1, 4, 32)
    quants = np.stack((pairs & 15, pairs >> 4), axis=2).reshape(-1, 8, 32)
    step, base = _half(raw[:, :2]) * scales, _half(raw[:, 2:4]) * minima
    return (step[..., None] * quants - base[..., None]).reshape(-1, 256)


def _q6_k(raw: np.ndarray) -> np.ndarray:
    """16 groups of 16; four low bits in 128 bytes, two high bits in 64, int8 scales."""
    packed = raw[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate((packed & 15, packed >> 4), axis=2).reshape(-1, 8, 32)
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    quants = (low | ((high & 3) << 4).reshape(-1, 8, 32)).astype(np.float32).reshape(-1, 16, 16) - 32
    scales = _half(raw[:, 208:210]) * raw[:, 192:208].view(np.int8)
    return (scales[..., None] * quants).reshape(-1, 256)


@dataclass(frozen=True, slots=True)
class _Format:
    name: str
    elements: int
    bytes: int
    decode: Callable[[np.ndarray], np.ndarray]


_FORMATS = {
    0: _Format("F32", 1, 4, _f32),
    1: _Format("F16", 1, 2, _half),
    2: _Format("Q4_0", 32, 18, _q4_0),
    3: _Format("Q4_1", 32, 20, _q4_1),
    6: _Format("Q5_0", 32, 22, _q5_0),
    7: _Format("Q5_1", 32, 24, _q5_1),
    8: _Format("Q8_0", 32, 34, _q8_0),
    12: _Format("Q4_K", 256, 144, _q4_k),
    14: _Format("Q6_K", 256, 210, _q6_k),
    30: _Format("BF16", 1, 2, _bf16),
}
