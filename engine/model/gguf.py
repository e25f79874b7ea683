"""Reader of GGUF files (version 2 and 3, little-endian): metadata, tensor table, dequantisation.

The header is read here: the file is mapped, never read whole, and every offset is checked against its end before
use, since such files often arrive cut short. Blocks are decoded by the package of the format's authors, which is
imported with the first file: other models do without.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.common.regular import check_regular
from engine.errors import SlalomError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_CUT = "the file is damaged or cut short; fetch it again"
_OTHER = "it is not supported; take a file of another one, such as Q8_0, Q4_K or BF16"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"} | {
    10: "<Q", 11: "<q", 12: "<d"
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MOST_ENTRIES, _MOST_VALUES = 2**17, 2**22  # of metadata or tensors, and of one array: a vocabulary
_LONGEST_TEXT = 2**22


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One row of the tensor table; ``shape`` is in torch's order (the file stores it reversed)."""

    name: str
    shape: tuple[int, ...]
    form: GGMLQuantizationType
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
        if max(n_tensors, n_metadata) > _MOST_ENTRIES:
            raise SlalomError(f"{path}: entries", max(n_tensors, n_metadata), _CUT)
        self.metadata: dict[str, Any] = {}
        for _ in range(n_metadata):
            key = reader.string()
            self.metadata[key] = reader.value(reader.scalar(4))
        rows = [_tensor_row(reader) for _ in range(n_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**20:
            raise SlalomError(f"{path}: general.alignment", alignment, _CUT)
        start = -(-reader.at // alignment) * alignment
        self.tensors = {name: self._locate(name, shape, kind, start + at) for name, shape, kind, at in rows}

    def _locate(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            form = GGMLQuantizationType(kind)
        except ValueError:
            raise SlalomError(f"{self.path}: {name}: tensor type", kind, _OTHER) from None
        elements, block_bytes = GGML_QUANT_SIZES[form]
        size = math.prod(shape) // elements * block_bytes
        if not shape or shape[-1] % elements or size == 0 or offset + size > len(self._data):
            raise SlalomError(f"{self.path}: {name}: shape", shape, _CUT)
        return TensorInfo(name, shape, form, offset, size)

    def load(self, name: str) -> np.ndarray:
        """The tensor as float32 (a fresh, writable array), dequantised.

        :raises SlalomError: no tensor of that name
        """
        from gguf import quants

        info = self.tensors.get(name)
        if info is None:
            raise SlalomError(f"{self.path}: tensor", name, "the file lacks it; is it a whole Llama-family model?")
        raw = np.frombuffer(self._data, dtype=np.uint8, count=info.size, offset=info.offset)
        try:
            values = quants.dequantize(raw.reshape(math.prod(info.shape[:-1]), -1), info.form)
        except NotImplementedError:
            raise SlalomError(f"{self.path}: {name}: tensor type", info.form.name, _OTHER) from None
        return np.require(values.reshape(info.shape), np.float32, "W")  # plain float32 is the mapped file itself


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
        length = self.scalar(10)
        if length > _LONGEST_TEXT:
            raise SlalomError(f"{self.path}: byte {self.at}: text", f"{length} bytes", _CUT)
        return self.take(length).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(self.scalar(4), self.scalar(10))
        if kind not in _SCALARS:
            raise SlalomError(f"{self.path}: byte {self.at}: value type", kind, _CUT)
        return self.scalar(kind)

    def _array(self, kind: int, count: int) -> list[Any]:
        if count > _MOST_VALUES:
            raise SlalomError(f"{self.path}: byte {self.at}: array", (kind, count), _CUT)
        if kind in _SCALARS:
            form = _SCALARS[kind]
            raw = self.take(count * struct.calcsize(form))
            return list(struct.unpack(f"<{count}{form[1]}", raw))
        if kind != _STRING:
            raise SlalomError(f"{self.path}: byte {self.at}: array", (kind, count), _CUT)
        return [self.string() for _ in range(count)]


def _tensor_row(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name, n_dims = reader.string(), reader.scalar(4)
    if n_dims > 4:
        raise SlalomError(f"{reader.path}: {name}: dimensions", n_dims, _CUT)
    shape = tuple(reader.scalar(10) for _ in range(n_dims))[::-1]
    return name, shape, reader.scalar(4), reader.scalar(10)
