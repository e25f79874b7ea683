"""The device under measurement, real or dry: lanes, graphs, timing and the shapes to measure at."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.kernels import Kernels, make_kernels
from engine.lanes.base import Lane
from engine.lanes.driver import Driver, Resource
from engine.lanes.gpu import GpuDevice, Streams, TorchStreams
from engine.live.graphs import Capturer, CudaCapturer
from engine.model import KVPool, ModelRunner, load_model

T = TypeVar("T")


@dataclass(frozen=True)
class Sizes:
    """What is measured at. Tokens, elements, times repeated."""

    model: str
    dtypes: tuple[torch.dtype, ...]
    batches: tuple[int, ...]
    context: int
    chunks: tuple[int, ...]
    prompts: tuple[int, ...]
    gemm: tuple[int, int, int]
    square: int
    copy_bytes: int
    decode_sms: tuple[int, ...]
    cuts: tuple[int, ...]  # SMs of decode; the least certain last
    repeats: int
    itl_steps: int
    itl_batch: int
    itl_prompt: int
    heads: tuple[int, int, int]


REAL = Sizes(
    model="dummy:llama-8b", dtypes=(torch.bfloat16, torch.float16), batches=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    context=1024, chunks=(16, 64, 128, 256, 384), prompts=(512, 2048, 8192), gemm=(2048, 4096, 14336), square=8192,
    copy_bytes=4 << 30,
    decode_sms=tuple(range(8, 125, 4)), cuts=(20, 28, 36, 44, 60, 76, 92, 108, 12), repeats=20, itl_steps=300,
    itl_batch=32, itl_prompt=4096, heads=(32, 8, 128),
)  # fmt: skip
TINY = Sizes(
    model="dummy:tiny", dtypes=(torch.float16,), batches=(1, 3), context=40, chunks=(16,), prompts=(24,),
    gemm=(8, 16, 16), square=16, copy_bytes=1 << 10, decode_sms=(8, 20, 23), cuts=(20, 36), repeats=2, itl_steps=6,
    itl_batch=2, itl_prompt=32, heads=(4, 2, 16),
)  # fmt: skip


class Rig:
    """One device. ``dry`` runs the same code on a CPU: figures then mean nothing, but every call was made."""

    def __init__(self, device: str, sizes: Sizes, driver: Driver, streams: Streams, *, dry: bool) -> None:
        self.device, self.sizes, self.dry = torch.device(device), sizes, dry
        self.driver, self.streams, self.gpu = driver, streams, GpuDevice(driver, streams)
        self.dtype = torch.float32 if dry else torch.bfloat16

    def capturer(self) -> Capturer:
        return DryCapturer() if self.dry else CudaCapturer(0)

    @cached_property
    def kernels(self) -> Kernels:
        return make_kernels("auto", self.device)

    @cached_property
    def runner(self) -> ModelRunner:
        """The big model with KV for the largest batch and the longest prompt, filled with noise."""
        s = self.sizes
        model = load_model(s.model, device=self.device, dtype=self.dtype)
        size = 16
        each = -(-(s.context + 2) // size)
        blocks = max(s.batches) * each + max(*s.prompts, s.itl_prompt) // size + 2
        pool = KVPool(model.config, blocks=blocks, block_tokens=size, dtype=self.dtype, device=self.device)
        for layer in pool.layers:
            layer.normal_()
        self.sync()
        return ModelRunner(model, pool)

    def sync(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def ms(self, function: Callable[[], Any], lane: Lane | None = None, repeats: int = 0) -> float:
        """Median milliseconds of ``function`` on ``lane``, warmed up; on a GPU between two events."""
        repeats = repeats or self.sizes.repeats
        lane = lane or self.gpu.whole().decode
        found: list[float] = []
        self.sync()  # inputs were made on another stream
        with lane.open(), torch.inference_mode():
            for k in range(repeats + 3):
                with self._timed(found if k >= 3 else []):
                    function()
        self.sync()
        return statistics.median(found)

    @contextmanager
    def _timed(self, found: list[float]) -> Iterator[None]:
        if self.dry:
            begin = time.perf_counter()
            yield
            found.append((time.perf_counter() - begin) * 1e3)
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last))

    def noise(self, *shape: int, dtype: torch.dtype | None = None, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32).to(dtype or self.dtype)


class DryDriver:
    """A driver of an H200's SMs that makes nothing."""

    def sms(self) -> Resource:
        return Resource(132, 8, 8)

    def split(self, whole: Resource, count: int) -> tuple[Resource, Resource]:
        group = -(-count // 8) * 8
        return Resource(group, 8, 8), Resource(whole.sms - group, 8, 8)

    def create(self, part: Resource) -> int:
        self._made = [*getattr(self, "_made", []), part.sms]
        return len(self._made)

    def sms_of(self, context: int) -> int:
        return int(self._made[context - 1])

    def stream(self, context: int) -> int:
        return context

    def destroy_stream(self, stream: int) -> None:
        return None

    def destroy(self, context: int) -> None:
        return None


class DryStreams:
    """Streams that are none: a CPU has done what it was told when the call returns."""

    def plain(self) -> Any:
        return None

    def wrap(self, handle: int) -> Any:
        return handle

    @contextmanager
    def use(self, stream: Any) -> Iterator[None]:
        yield

    def default(self) -> Any:
        return None

    def event(self, stream: Any) -> Any:
        return stream

    def after(self, stream: Any, event: Any) -> None:
        return None

    def wait(self, event: Any) -> None:
        return None

    def keep(self, tensor: Any, stream: Any) -> None:
        return None


class DryCapturer:
    """Runs the function again instead of a graph."""

    def capture(self, lane: Lane, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        result: Any = function()
        kept: Any = tuple(x.clone() for x in result) if isinstance(result, tuple) else result.clone()

        def replay() -> None:
            found: Any = function()
            pairs = zip(kept, found, strict=True) if isinstance(kept, tuple) else [(kept, found)]
            for old, new in pairs:
                old.copy_(new)

        return replay, kept

    def held_bytes(self) -> int:
        return 0


def make_rig(*, dry: bool) -> Rig:
    """The first GPU, or its stand-in.

    :raises SlalomError: no GPU, or a driver without green contexts
    """
    if dry:
        torch.set_num_threads(1)
        return Rig("cpu", TINY, DryDriver(), DryStreams(), dry=True)
    from engine.lanes.driver import CudaDriver

    torch.zeros(1, device="cuda")
    return Rig("cuda", REAL, CudaDriver(0), TorchStreams(0), dry=False)
