"""The ctypes layer against a library of the same binary interface, made of callbacks: every argument is marshalled."""

from __future__ import annotations

import ctypes
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_uint, c_void_p
from typing import Any

import pytest

from engine.errors import SlalomError
from engine.lanes.driver import CudaDriver, _Resource
from engine.lanes.gpu import make_gpu

RESOURCE = POINTER(_Resource)


class Library:
    """Functions as ``libcuda`` exports them."""

    def __init__(self, sms: int = 132, missing: str = "") -> None:
        self.contexts: dict[int, int] = {}
        self.streams: list[int] = []
        self._descriptions: list[int] = []
        self.fail = ""

        def function(name: str, *types: Any) -> Any:
            def wrap(body: Any) -> None:
                def checked(*arguments: Any) -> int:
                    return 801 if self.fail == name else (body(*arguments) or 0)

                if name != missing:
                    setattr(self, name, CFUNCTYPE(c_int, *types)(checked))

            return wrap

        @function("cuInit", c_uint)
        def _(flags: int) -> None:
            assert flags == 0

        @function("cuDeviceGet", POINTER(c_int), c_int)
        def _(device: Any, ordinal: int) -> None:
            device[0] = 40 + ordinal

        @function("cuDeviceGetDevResource", c_int, RESOURCE, c_int)
        def _(device: int, resource: Any, kind: int) -> None:
            assert (device, kind) == (41, 1)
            self._fill(resource[0], sms)

        @function("cuDevSmResourceSplitByCount", RESOURCE, POINTER(c_uint), RESOURCE, RESOURCE, c_uint, c_uint)
        def _(result: Any, groups: Any, whole: Any, rest: Any, flags: int, least: int) -> None:
            assert (groups[0], flags) == (1, 0)
            count = -(-least // 8) * 8
            self._fill(result[0], count)
            self._fill(rest[0], whole[0].sm.sms - count)

        @function("cuDevResourceGenerateDesc", POINTER(c_void_p), RESOURCE, c_uint)
        def _(description: Any, resources: Any, n: int) -> None:
            assert n == 1
            self._descriptions.append(resources[0].sm.sms)
            description[0] = len(self._descriptions)

        @function("cuGreenCtxCreate", POINTER(c_void_p), c_void_p, c_int, c_uint)
        def _(context: Any, description: int, device: int, flags: int) -> None:
            assert (device, flags) == (41, 1)
            context[0] = 0x7F0000000000 + description  # wider than an int
            self.contexts[context[0]] = self._descriptions[description - 1]

        @function("cuGreenCtxGetDevResource", c_void_p, RESOURCE, c_int)
        def _(context: int, resource: Any, kind: int) -> None:
            self._fill(resource[0], self.contexts[context])

        @function("cuGreenCtxStreamCreate", POINTER(c_void_p), c_void_p, c_uint, c_int)
        def _(stream: Any, context: int, flags: int, priority: int) -> None:
            assert (flags, priority) == (1, 0)
            assert context in self.contexts
            stream[0] = 0x7E0000000000 + len(self.streams)
            self.streams.append(stream[0])

        @function("cuGreenCtxDestroy", c_void_p)
        def _(context: int) -> None:
            del self.contexts[context]

        @function("cuStreamDestroy_v2", c_void_p)
        def _(stream: int) -> None:
            self.streams.remove(stream)

        @function("cuGetErrorName", c_int, POINTER(c_char_p))
        def _(code: int, text: Any) -> None:
            text[0] = b"CUDA_ERROR_NOT_SUPPORTED"

    def _fill(self, resource: Any, sms: int) -> None:
        resource.type, resource.sm.sms, resource.sm.least, resource.sm.alignment = 1, sms, 8, 8


def test_a_partition_through_the_binary_interface() -> None:
    library = Library()
    driver = CudaDriver(1, library)
    whole = driver.sms()
    assert (whole.sms, whole.least, whole.alignment) == (132, 8, 8)
    group, rest = driver.split(whole, 100)
    assert (group.sms, rest.sms) == (104, 28)
    context = driver.create(rest)
    assert driver.sms_of(context) == 28
    stream = driver.stream(context)
    assert library.streams == [stream]
    driver.destroy_stream(stream)
    driver.destroy(context)
    assert (library.streams, library.contexts) == ([], {})


def test_the_drivers_own_words_are_passed_on() -> None:
    library = Library()
    driver = CudaDriver(1, library)
    library.fail = "cuDevSmResourceSplitByCount"
    with pytest.raises(SlalomError, match=r"SplitByCount.*NOT_SUPPORTED"):
        driver.split(driver.sms(), 16)


def test_an_old_driver_is_named() -> None:
    with pytest.raises(SlalomError, match=r"cuGreenCtxCreate.*550"):
        CudaDriver(1, Library(missing="cuGreenCtxCreate"))


def test_a_machine_without_a_gpu() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
        pytest.skip("this machine has a driver")
    except OSError:
        pass
    with pytest.raises(SlalomError, match="no NVIDIA driver"):
        CudaDriver()
    with pytest.raises(SlalomError, match="torch sees no GPU"):
        make_gpu(0)
