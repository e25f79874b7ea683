"""SM lanes: green contexts with a stream each, disjoint by construction. Not yet verified on GPU.

A partition is made as SGLang's PD multiplexing makes it (sgl-kernel, ``greenctx_stream``): one aligned group of SMs
is split off the device and the remainder is the other half. Whichever of the two counts is aligned is the group. A
lane is a stream of its half; torch's current context stays the primary one, only streams change.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from engine.errors import SlalomError
from engine.lanes.base import Device, Lane, Partition
from engine.lanes.driver import CudaDriver, Driver

_log = logging.getLogger("slalom.lanes")


class Streams(Protocol):
    """What lanes need of torch's streams."""

    def plain(self) -> Any:
        """A new stream on all SMs."""
        ...

    def wrap(self, handle: int) -> Any:
        """torch's view of a driver's stream."""
        ...

    def default(self) -> Any:
        """What threads launch on that are in no lane; it waits for no lane, and no lane for it."""
        ...

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """Within it the calling thread launches on ``stream``."""
        ...

    def event(self, stream: Any) -> Any:
        """An event that happens once all launched on ``stream`` so far has ended."""
        ...

    def after(self, stream: Any, event: Any) -> None:
        """What is launched on ``stream`` from now on waits for ``event``."""
        ...

    def wait(self, event: Any) -> None:
        """The host waits for ``event``."""
        ...

    def keep(self, tensor: Any, stream: Any) -> None:
        """Do not reuse the memory of ``tensor`` before what is launched on ``stream`` has ended."""
        ...


class TorchStreams:
    """:class:`Streams` of one CUDA device."""

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)

    def plain(self) -> Any:
        return torch.cuda.Stream(self._device)

    def wrap(self, handle: int) -> Any:
        return torch.cuda.ExternalStream(handle, device=self._device)

    def default(self) -> Any:
        return torch.cuda.default_stream(self._device)

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def event(self, stream: Any) -> Any:
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def after(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def wait(self, event: Any) -> None:
        event.synchronize()

    def keep(self, tensor: Any, stream: Any) -> None:
        tensor.record_stream(stream)


class GpuLane(Lane):
    """A stream and the SMs it runs on."""

    def __init__(self, size: int, stream: Any, streams: Streams) -> None:
        self.size, self.stream, self._streams = size, stream, streams

    def open(self) -> AbstractContextManager[Any]:
        return self._streams.use(self.stream)

    def follow(self, other: Lane) -> None:
        assert isinstance(other, GpuLane)
        if other is not self:
            self._streams.after(self.stream, self._streams.event(other.stream))

    def catch_up(self) -> None:
        self._streams.after(self.stream, self._streams.event(self._streams.default()))

    def wait(self) -> None:
        self._streams.wait(self._streams.event(self.stream))

    def keep(self, *tensors: Any) -> None:
        for tensor in tensors:
            if tensor is not None:
                self._streams.keep(tensor, self.stream)


class GpuDevice(Device):
    """One GPU. Green contexts are shared by all who ask for the same cut; streams are everybody's own.

    Contexts live until :meth:`close`: torch never gives up an external stream, so one that was used must not go
    away under it.
    """

    def __init__(self, driver: Driver, streams: Streams) -> None:
        self._driver, self._streams = driver, streams
        self._sms = driver.sms()
        self.total = self._sms.sms
        self._contexts: dict[int, tuple[int, int]] = {}  # by decode SMs: those of prefill and decode
        self._made: list[tuple[int, Any]] = []  # streams of green contexts, oldest first

    def whole(self) -> Partition:
        return Partition(
            GpuLane(self.total, self._streams.plain(), self._streams),
            GpuLane(self.total, self._streams.plain(), self._streams),
        )

    def split(self, decode: int) -> Partition:
        if decode not in self._contexts:
            self._contexts[decode] = self._cut(decode)
        made: list[tuple[int, Any]] = []
        try:
            for context in self._contexts[decode]:
                handle = self._driver.stream(context)
                made.append((handle, None))
                made[-1] = (handle, self._streams.wrap(handle))
        except Exception:
            self._undo([handle for handle, _ in made], [])
            raise
        self._made += made
        sizes = (self.total - decode, decode)
        prefill, decoding = (
            GpuLane(size, stream, self._streams) for size, (_, stream) in zip(sizes, made, strict=True)
        )
        return Partition(prefill, decoding)

    def _cut(self, decode: int) -> tuple[int, int]:
        """Contexts of prefill and decode; nothing is left behind when one cannot be had."""
        rest, sms = self.total - decode, self._sms
        if min(decode, rest) < sms.least:
            fix = f"each lane needs {sms.least} of the {self.total} SMs or more"
            raise SlalomError("decode SMs", decode, fix)
        aligned = [count for count in (rest, decode) if count % sms.alignment == 0]
        if not aligned:
            below = self.total - (rest // sms.alignment + 1) * sms.alignment
            near = sorted({decode // sms.alignment * sms.alignment, below} - {0})
            fix = f"this count or its rest ({rest}) must be a multiple of {sms.alignment}: take {near[0]} or {near[-1]}"
            raise SlalomError("decode SMs", decode, fix)
        group, remainder = self._driver.split(sms, aligned[0])
        parts = (group, remainder) if aligned[0] == rest else (remainder, group)
        contexts: list[int] = []
        try:
            for part, wanted in zip(parts, (rest, decode), strict=True):
                contexts.append(self._driver.create(part))
                if (found := self._driver.sms_of(contexts[-1])) != wanted:
                    raise SlalomError(
                        "decode SMs", decode, f"the driver gave {found} SMs where {wanted} were asked for"
                    )
        except Exception:
            self._undo([], contexts)
            raise
        return contexts[0], contexts[1]

    def _undo(self, streams: list[int], contexts: list[int]) -> None:
        """Give back, last made first; what cannot be given back is only reported."""
        for give_back, handles in ((self._driver.destroy_stream, streams), (self._driver.destroy, contexts)):
            for handle in reversed(handles):
                try:
                    give_back(handle)
                except Exception as error:
                    _log.warning("a green context is left over: %s", error)

    def close(self) -> None:
        for _, stream in self._made:
            self._streams.wait(self._streams.event(stream))
        contexts = [context for pair in self._contexts.values() for context in pair]
        self._undo([handle for handle, _ in self._made], contexts)
        self._made, self._contexts = [], {}


def make_gpu(index: int) -> GpuDevice:
    """The GPU ``index`` of this process.

    :raises SlalomError: no GPU, or a driver without green contexts
    """
    if not torch.cuda.is_available():
        raise SlalomError("device", "cuda", "torch sees no GPU here; use cpu")
    torch.zeros(1, device=torch.device("cuda", index))  # the primary context, which green contexts belong to
    return GpuDevice(CudaDriver(index), TorchStreams(index))
