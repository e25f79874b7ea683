"""Lanes: cores that are really bound, SM partitions against a driver that writes down what it is asked."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import SlalomError
from engine.lanes.base import WHOLE, Device, Lane, Partition
from engine.lanes.cpu import CpuDevice
from engine.lanes.driver import Resource
from engine.lanes.gpu import GpuDevice, GpuLane
from engine.lanes.partitions import Lanes, make_device

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="a partition needs two cores")


class FakeDriver:
    """A driver of ``sms`` SMs that writes down every call; ``fail_at`` names the call that fails, and which time."""

    def __init__(self, sms: int = 132, *, fail_at: tuple[str, int] | None = None, short: int = 0) -> None:
        self.log: list[str] = []
        self.alive: dict[int, Any] = {}
        self._whole, self._short, self._fail_at = Resource(sms, 8, 8), short, fail_at
        self._next = 100

    def _note(self, what: str, text: str = "") -> None:
        self.log.append(f"{what}{text}")
        if self._fail_at and self._fail_at == (what, sum(line.startswith(what) for line in self.log)):
            raise SlalomError(what, "CUDA_ERROR_UNKNOWN", "made to fail")

    def _new(self, value: Any) -> int:
        self._next += 1
        self.alive[self._next] = value
        return self._next

    def sms(self) -> Resource:
        return self._whole

    def split(self, whole: Resource, count: int) -> tuple[Resource, Resource]:
        self._note("split", f" {count}")
        assert count % 8 == 0
        return Resource(count, 8, 8, "group"), Resource(whole.sms - count - self._short, 8, 8, "rest")

    def create(self, part: Resource) -> int:
        self._note("create", f" {part.sms}")
        return self._new(part)

    def sms_of(self, context: int) -> int:
        return int(self.alive[context].sms)

    def stream(self, context: int) -> int:
        self._note("stream", f" {self.alive[context].sms}")
        return self._new(context)

    def destroy_stream(self, stream: int) -> None:
        self._note("end stream")
        assert self.alive.pop(stream) in self.alive, "the context went before its stream"

    def destroy(self, context: int) -> None:
        self._note("end context")
        assert context not in [c for c in self.alive.values() if isinstance(c, int)], "a stream is left on it"
        del self.alive[context]


class FakeStreams:
    """Streams as counters of what was launched; an event is a position."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.plain_made = log, 0

    def plain(self) -> str:
        self.plain_made += 1
        return f"plain-{self.plain_made}"

    def wrap(self, handle: int) -> str:
        return f"green-{handle}"

    def default(self) -> str:
        return "default"

    @contextmanager
    def use(self, stream: str) -> Iterator[None]:
        self.log.append(f"use {stream}")
        yield

    def event(self, stream: str) -> str:
        return f"event of {stream}"

    def after(self, stream: str, event: str) -> None:
        self.log.append(f"{stream} after {event}")

    def wait(self, event: str) -> None:
        self.log.append(f"host waits for {event}")

    def keep(self, tensor: Any, stream: str) -> None:
        self.log.append(f"keep {tensor} for {stream}")


def gpu(**options: Any) -> tuple[GpuDevice, FakeDriver]:
    driver = FakeDriver(**options)
    return GpuDevice(driver, FakeStreams(driver.log)), driver


# -- a GPU


def test_the_aligned_half_is_the_group_and_the_remainder_is_the_other() -> None:
    device, driver = gpu()
    pair = device.split(20)  # 112 are left, a multiple of 8
    assert (pair.prefill.size, pair.decode.size) == (112, 20)
    assert driver.log == ["split 112", "create 112", "create 20", "stream 112", "stream 20"]
    driver.log.clear()
    pair = device.split(24)  # 108 are not: decode is the group
    assert (pair.prefill.size, pair.decode.size) == (108, 24)
    assert driver.log == ["split 24", "create 108", "create 24", "stream 108", "stream 24"]


def test_two_instances_share_contexts_but_no_stream() -> None:
    device, driver = gpu()
    first, second = device.split(20), device.split(20)
    assert sum(line.startswith("create") for line in driver.log) == 2
    streams = [lane.stream for pair in (first, second) for lane in pair if isinstance(lane, GpuLane)]
    assert len(set(streams)) == 4


@given(decode=st.integers(-8, 140))
def test_every_count_is_made_exactly_or_refused(decode: int) -> None:
    device, driver = gpu()
    possible = 8 <= decode <= 124 and (decode % 8 == 0 or (132 - decode) % 8 == 0)
    if possible:
        pair = device.split(decode)
        assert (pair.prefill.size, pair.decode.size) == (132 - decode, decode)
    else:
        with pytest.raises(SlalomError, match="decode SMs"):
            device.split(decode)
        assert driver.log == [], "asked the driver for what cannot be"
    device.close()
    assert driver.alive == {}


def test_a_refusal_names_counts_that_can_be_had() -> None:
    device, _ = gpu()
    with pytest.raises(SlalomError, match="take 16 or 20"):
        device.split(21)
    device.split(16)
    device.split(20)


@pytest.mark.parametrize(
    "fail_at",
    [("split", 1), ("create", 1), ("create", 2), ("stream", 1), ("stream", 2)],
    ids=lambda f: f"{f[0]}-{f[1]}",
)
def test_whatever_fails_nothing_is_left_over(fail_at: tuple[str, int]) -> None:
    device, driver = gpu(fail_at=fail_at)
    with pytest.raises(SlalomError, match="made to fail"):
        device.split(20)
    streams = [handle for handle, of in driver.alive.items() if isinstance(of, int)]
    assert streams == []
    assert device.split(20).decode.size == 20, "the device is still good"
    device.close()
    assert driver.alive == {}


def test_fewer_sms_than_asked_is_an_error() -> None:
    device, driver = gpu(short=4)
    with pytest.raises(SlalomError, match="gave 16 SMs where 20"):
        device.split(20)
    assert driver.alive == {}


def test_closing_waits_then_ends_streams_then_contexts() -> None:
    device, driver = gpu()
    device.split(20)
    driver.log.clear()
    device.close()
    assert [line.split()[0] + " " + line.split()[1] for line in driver.log] == [
        "host waits", "host waits", "end stream", "end stream", "end context", "end context"
    ]  # fmt: skip
    device.close()  # once is enough


def test_a_lane_follows_another_by_event_and_the_host_waits_for_nothing() -> None:
    device, driver = gpu()
    before, after = device.split(20).prefill, device.split(36).prefill
    assert isinstance(before, GpuLane)
    assert isinstance(after, GpuLane)
    driver.log.clear()
    after.follow(before)
    after.follow(after)
    after.keep("hidden", None)
    assert driver.log == [f"{after.stream} after event of {before.stream}", f"keep hidden for {after.stream}"]


# -- partitions of an instance


class Blocks(Device):
    """Any cut is possible."""

    def __init__(self, total: int) -> None:
        self.total = total

    def whole(self) -> Partition:
        return Partition(CpuDevice().whole().prefill, CpuDevice().whole().decode)

    def split(self, decode: int) -> Partition:
        return self.whole()


@given(sizes=st.lists(st.integers(1, 60), min_size=2, max_size=8, unique=True).map(sorted), data=st.data())
def test_prefill_runs_beside_decode_on_the_same_partition(sizes: list[int], data: st.DataObject) -> None:
    """For every decode row: prefill's share row, as the core computes it, names that very partition."""
    lanes = Lanes(Blocks(sizes[-1]), sizes)
    row = data.draw(st.integers(0, len(sizes) - 1))
    if row == len(sizes) - 1:
        assert lanes.partition(0, row) == lanes.partition(1, row) == WHOLE
        return
    rest = sizes[-1] - sizes[row]
    left = max((k for k, size in enumerate(sizes) if size <= rest), default=0)
    assert lanes.partition(1, row) == row
    assert lanes.partition(0, left, beside=row) == row
    alone = lanes.partition(0, left)
    rest = sizes[-1] - sizes[alone]
    assert max((k for k, size in enumerate(sizes) if size <= rest), default=0) == left


def test_a_profile_of_another_device_is_refused() -> None:
    device, _ = gpu()
    with pytest.raises(SlalomError, match="this device has 132"):
        Lanes(device, [20, 108])
    lanes = Lanes(device, [20, 60, 132])
    assert lanes.describe() == [
        {"asked": 20, "prefill": 112, "decode": 20},
        {"asked": 60, "prefill": 72, "decode": 60},
        {"asked": 132, "prefill": 132, "decode": 132},
    ]
    assert Lanes(device, [1]).describe()[0]["decode"] == 132, "a table without shares is the whole device"


def test_unknown_devices() -> None:
    with pytest.raises(SlalomError, match="choose cpu or cuda"):
        make_device("tpu")


# -- a CPU


def cores_within(lane: Lane) -> set[int]:
    """Where a thread may run once it is in ``lane``."""
    found: set[int] = set()

    def work() -> None:
        with lane.open():
            found.update(os.sched_getaffinity(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found


@needs_two_cores
def test_cpu_lanes_are_disjoint_cores() -> None:
    device = make_device("cpu")
    assert device.total == len(CORES)
    pair = device.split(1)
    prefill, decode = cores_within(pair.prefill), cores_within(pair.decode)
    assert len(decode) == pair.decode.size == 1
    assert len(prefill) == pair.prefill.size == len(CORES) - 1
    assert prefill | decode == set(CORES)
    assert prefill & decode == set()
    assert cores_within(device.whole().decode) == set(CORES)
    assert set(os.sched_getaffinity(0)) == set(CORES), "only the lanes' own threads are bound"


@needs_two_cores
def test_cores_that_are_not_there_are_refused() -> None:
    with pytest.raises(SlalomError, match="may use"):
        CpuDevice([10**6])
    for count in (0, len(CORES), 10**6):
        with pytest.raises(SlalomError, match="decode cores"):
            CpuDevice().split(count)
