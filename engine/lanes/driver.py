"""The CUDA driver calls behind SM partitions, by ctypes: not yet verified on GPU.

Through ``libcuda`` itself, because torch's own green contexts overlap up to 2.14 (each ``create`` splits the whole
device afresh, pytorch#195378), and because every driver since 12.4 (550) exports these functions with one layout:
``sizeof(CUdevResource) = 144`` with the SM fields at offset 96, as in CUDA 13.0's ``cuda.h``.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_char, c_char_p, c_int, c_uint, c_void_p
from dataclasses import dataclass
from typing import Any, Protocol

from engine.errors import SlalomError

_TYPE_SM = 1
_DEFAULT_STREAM = 1  # CU_GREEN_CTX_DEFAULT_STREAM, the only flag there is, and a must
_NON_BLOCKING = 1


@dataclass(frozen=True)
class Resource:
    """Some SMs of a device.

    :param sms: how many
    :param least: the fewest that a partition may have
    :param alignment: a partition's count is a multiple of this; a remainder may be any
    :param raw: the driver's own description
    """

    sms: int
    least: int
    alignment: int
    raw: Any = None


class Driver(Protocol):
    """What partitions need of the driver. Handles are addresses."""

    def sms(self) -> Resource:
        """All SMs of the device."""
        ...

    def split(self, whole: Resource, count: int) -> tuple[Resource, Resource]:
        """A group of at least ``count`` SMs, and the others."""
        ...

    def create(self, part: Resource) -> int:
        """A green context on ``part``."""
        ...

    def sms_of(self, context: int) -> int:
        """SMs that a green context really has."""
        ...

    def stream(self, context: int) -> int:
        """A new stream of a green context, which does not wait for the default stream."""
        ...

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back; what was launched on it has ended."""
        ...

    def destroy(self, context: int) -> None:
        """Give a green context back, after its streams."""
        ...


class _Sm(Structure):
    _fields_ = (("sms", c_uint), ("least", c_uint), ("alignment", c_uint), ("flags", c_uint))


class _Resource(Structure):
    """CUdevResource."""

    _fields_ = (("type", c_int), ("_internal", c_char * 92), ("sm", _Sm), ("_rest", c_char * 32))


assert ctypes.sizeof(_Resource) == 144
assert _Resource.sm.offset == 96

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetDevResource": (c_int, POINTER(_Resource), c_int),
    "cuDevSmResourceSplitByCount": (
        POINTER(_Resource), POINTER(c_uint), POINTER(_Resource), POINTER(_Resource), c_uint, c_uint,
    ),
    "cuDevResourceGenerateDesc": (POINTER(c_void_p), POINTER(_Resource), c_uint),
    "cuGreenCtxCreate": (POINTER(c_void_p), c_void_p, c_int, c_uint),
    "cuGreenCtxGetDevResource": (c_void_p, POINTER(_Resource), c_int),
    "cuGreenCtxStreamCreate": (POINTER(c_void_p), c_void_p, c_uint, c_int),
    "cuGreenCtxDestroy": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
}  # fmt: skip


class CudaDriver:
    """:class:`Driver` over ``libcuda``.

    The device's primary context must exist (torch makes it), and stay.

    :param index: of the device
    :param library: ``libcuda``, loaded if not given
    :raises SlalomError: no driver here, or one without green contexts (before 550)
    """

    def __init__(self, index: int = 0, library: Any = None) -> None:
        self._library = library if library is not None else _load()
        for name, types in _SIGNATURES.items():
            try:
                getattr(self._library, name).argtypes = types
            except AttributeError as error:
                raise SlalomError(
                    "SM partitions", name, "the NVIDIA driver lacks it: 550 or newer is needed"
                ) from error
        self._call("cuInit", 0)
        device = c_int()
        self._call("cuDeviceGet", byref(device), index)
        self._device = device.value

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            text = c_char_p()
            self._library.cuGetErrorName(code, byref(text))
            said = text.value.decode() if text.value else f"error {code}"
            raise SlalomError(f"SM partitions: {name}", said, "the driver refuses; see its documentation")

    def sms(self) -> Resource:
        found = _Resource()
        self._call("cuDeviceGetDevResource", self._device, byref(found), _TYPE_SM)
        return _described(found)

    def split(self, whole: Resource, count: int) -> tuple[Resource, Resource]:
        group, rest, groups = (_Resource * 1)(), _Resource(), c_uint(1)
        self._call("cuDevSmResourceSplitByCount", group, byref(groups), byref(whole.raw), byref(rest), 0, count)
        if groups.value != 1:
            raise SlalomError("SM partitions", f"{count} SMs", f"the driver made {groups.value} groups of them")
        return _described(group[0]), _described(rest)

    def create(self, part: Resource) -> int:
        description, context = c_void_p(), c_void_p()
        self._call("cuDevResourceGenerateDesc", byref(description), byref(part.raw), 1)
        self._call("cuGreenCtxCreate", byref(context), description, self._device, _DEFAULT_STREAM)
        return context.value or 0

    def sms_of(self, context: int) -> int:
        found = _Resource()
        self._call("cuGreenCtxGetDevResource", context, byref(found), _TYPE_SM)
        return int(found.sm.sms)

    def stream(self, context: int) -> int:
        stream = c_void_p()
        self._call("cuGreenCtxStreamCreate", byref(stream), context, _NON_BLOCKING, 0)
        return stream.value or 0

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", stream)

    def destroy(self, context: int) -> None:
        self._call("cuGreenCtxDestroy", context)


def _load() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise SlalomError("device", "cuda", "no NVIDIA driver (libcuda.so.1) on this machine") from error


def _described(raw: _Resource) -> Resource:
    # a driver that leaves the last two at zero has no rule of its own: one SM is then the unit
    return Resource(int(raw.sm.sms), int(raw.sm.least) or 1, int(raw.sm.alignment) or 1, raw)
