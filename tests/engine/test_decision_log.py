"""The decision log: what a line says, rotation, a full ring, and a server that is killed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.columns import N_CANDIDATE, N_CONTEXT, Col, Ctx, Kind
from engine.errors import SlalomError
from engine.live.fate import SERVER
from policies.guard.log.log import DecisionLog
from policies.guard.log.ring import Meta, Ring, Type
from policies.guard.log.writer import REASONS, Lines, Rotated, pump

ROOT = Path(__file__).resolve().parents[2]


def decision(seq: int = 1, n: int = 3, *, scores: bool = True, **meta: int) -> tuple[np.ndarray, ...]:
    """A placement on ``n`` instances with recognisable numbers."""
    numbers = np.zeros(len(Meta), np.int64)
    context, candidates = np.zeros(N_CONTEXT), np.zeros((n + 2, N_CANDIDATE))
    context[Ctx.PROMPT], context[Ctx.SIZE] = 321.0, 0.25
    candidates[:n, Col.INSTANCE], candidates[:n, Col.TTFT_S] = np.arange(n), 0.1 * (1 + np.arange(n))
    candidates[n:, Col.INSTANCE] = -1.0
    candidates[n, Col.IS_HOLD], candidates[n + 1, Col.IS_SHED] = 1.0, 1.0
    mask = np.array([1] * (n + 1) + [0], np.uint8)
    score = np.array([0.5 - 0.125 * k for k in range(n + 2)]) if scores else np.zeros(0)
    given = {"SEQ": seq, "ROWS": n + 2, "SCORES": len(score), "REQUEST": 40 + seq, "LATENCY_NS": 12_500} | meta
    for name, value in given.items():
        numbers[Meta[name]] = value
    return numbers, context, candidates, mask, score


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_what_was_decided_and_on_what(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log.jsonl")
    log.note("policy", generation=0, name="mine")
    log.decision(*decision(1, TIME_NS=1_700_000_000 * 10**9, NOW=2 * 10**9))
    log.decision(*decision(2, CHOICE=3, ADVISED=-1, REASON=REASONS.index("deadline"), scores=False))
    log.close()
    assert (log.dropped, log.writing) == (0, False)
    note, one, two = lines(tmp_path / "log.jsonl")
    assert (note["type"], note["name"]) == ("policy", "mine")
    assert one | {"context": {}, "candidates": []} == {
        "type": "decision", "server": SERVER,
        "seq": 1, "time": 1.7e9, "now_s": 2.0, "kind": "place_prefill", "request": 41,
        "generation": 0, "choice": 0, "action": "instance 0", "advised": 0, "margin": 0.125, "reason": "policy",
        "fallback": False, "latency_us": 12.5, "context": {}, "candidates": [],
    }  # fmt: skip
    assert one["context"]["prompt"] == 321
    assert one["context"]["size"] == 0.25
    assert [c["action"] for c in one["candidates"]] == ["instance 0", "instance 1", "instance 2", "hold"]
    assert [c["score"] for c in one["candidates"]] == [0.5, 0.375, 0.25, 0.125]
    assert one["candidates"][2]["ttft_s"] == 0.3
    assert (two["action"], two["fallback"], two["advised"], two["margin"]) == ("hold", True, None, None)


def test_full_lines_hold_every_column(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log.jsonl", features="full", writer="thread")
    log.decision(*decision())
    log.close()
    (line,) = lines(tmp_path / "log.jsonl")
    assert set(line["context"]) == {c.name.lower() for c in Ctx}
    assert {c.name.lower() for c in Col} <= set(line["candidates"][0])


def test_files_rotate_and_nothing_is_lost_within_the_kept_ones(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log.jsonl", max_bytes=4000, keep=3, writer="thread")
    for seq in range(40):
        log.decision(*decision(seq))
    log.close()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["log.jsonl", "log.jsonl.1", "log.jsonl.2", "log.jsonl.3"]
    assert all((tmp_path / name).stat().st_size <= 4000 for name in names)
    kept = [line["seq"] for name in (*names[:0:-1], names[0]) for line in lines(tmp_path / name)]
    assert kept == list(range(40))[-len(kept) :]
    assert len(kept) >= 8


def test_a_ring_that_is_full_drops_and_counts(tmp_path: Path) -> None:
    ring = Ring(tmp_path / "ring", 4096)
    written = sum(ring.put(*decision(seq)) for seq in range(200))
    assert 0 < written < 200
    assert ring.dropped == 200 - written
    assert [int(r[2 + Meta.SEQ]) for r in ring.take()] == list(range(written))
    assert ring.put(*decision(7)), "there is room again"


@given(st.lists(st.tuples(st.sampled_from(["put", "note", "take"]), st.integers(1, 9)), max_size=60))
def test_the_ring_gives_back_what_was_put_in_order(steps: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ring, expected, records = Ring(Path(folder) / "ring", 3000), [], []
        for number, (what, size) in enumerate(steps):
            if what == "take":
                records += ring.take()
            elif ring.put(*decision(number, size)) if what == "put" else ring.note(b"%d" % number + b" " * size):
                expected.append(number)
        records += ring.take()
    found = []
    for record in records:
        is_note = record[1] == Type.NOTE
        found.append(int(Lines().line(record)) if is_note else Lines().decision(record)["seq"])
    assert found == expected


_KILLED = """
import os, signal, sys, time
sys.path[:0] = [{tests!r}]
from test_decision_log import decision
from policies.guard.log.log import DecisionLog
log = DecisionLog({path!r})
for seq in range(2000):
    log.decision(*decision(seq))
    if seq % 100 == 0:
        time.sleep(0.01)
print(log.written, log.dropped, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_sigkill_of_the_server_loses_nothing_that_was_decided(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    script = _KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split() == ["2000", "0"]
    end = time.monotonic() + 120.0
    while time.monotonic() < end and (not path.exists() or path.read_bytes().count(b"\n") < 2000):
        time.sleep(0.05)
    assert [line["seq"] for line in lines(path)] == list(range(2000))


def test_a_writer_that_dies_is_replaced(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log.jsonl")
    assert log._process is not None
    log._process.kill()
    log._process.wait()
    assert not log.writing
    log.decision(*decision(5))
    log.keep_writing()
    assert log.writing
    log.close()
    assert [line["seq"] for line in lines(tmp_path / "log.jsonl")] == [5]


def test_a_full_disk_is_said_once_and_counted_and_then_the_log_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ring, file = Ring(tmp_path / "ring", 20_000), Rotated(tmp_path / "log", 10**6, 1)
    append, full = Rotated._append, [False]

    def limited(self: Rotated, line: bytes) -> None:
        if full[0]:
            self._file.write(line[:10])  # what still fits
            self._file.truncate(self._size)
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, line)

    monkeypatch.setattr(Rotated, "_append", limited)
    for full[0], numbers in ((False, (1,)), (True, (2, 3)), (True, (4,)), (False, (5, 6))):
        for seq in numbers:
            assert ring.put(*decision(seq))
        assert pump(ring, Lines(), file) == len(numbers)
    file.close()
    assert [line["seq"] for line in lines(tmp_path / "log")] == [1, 5, 6]
    assert ring.dropped == 3
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert "No space left" in said[0]
    assert "3 lines are missing" in said[1]


def test_a_write_that_breaks_off_leaves_no_part_of_a_line(tmp_path: Path) -> None:
    file = Rotated(tmp_path / "log", 10**6, 1)
    assert file.write([b"one\n"]) == 1

    class Short:
        """Takes three bytes and then nothing."""

        closed, n = False, 0

        def write(self, piece: bytes) -> int:
            self.n += 1
            if self.n > 1:
                raise OSError(errno.ENOSPC, "full")
            return whole.write(piece[:3])

        def truncate(self, size: int) -> None:
            whole.truncate(size)

    whole, file._file = file._file, Short()  # type: ignore[assignment]
    assert file.write([b"two, which is long\n"]) == 0
    file._file = whole
    assert file.write([b"three\n"]) == 1
    file.close()
    assert (tmp_path / "log").read_bytes() == b"one\nthree\n"


@pytest.mark.parametrize("rest", [b"", b'{"cut', b"x" * 200_000])
def test_a_line_cut_by_a_power_loss_is_taken_off(rest: bytes, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"one\n" + rest)
    file = Rotated(tmp_path / "log", 10**6, 1)
    file.write([b"two\n"])
    file.close()
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"


def test_whoever_looks_after_the_log_replaces_its_writer_and_waits_longer_each_time(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log.jsonl")
    for replaced in (True, False):
        assert log._process is not None
        log._process.kill()
        log._process.wait()
        log.look_after()
        assert log._helper is not None
        log._helper.join(30)
        assert log.writing == replaced
    log._not_before = 0.0
    log.decision(*decision(5))
    log.look_after()
    log._helper.join(30)
    assert log.writing
    log.close()
    assert [line["seq"] for line in lines(tmp_path / "log.jsonl")] == [5]


def test_kinds_and_control_decisions_have_words(tmp_path: Path) -> None:
    numbers, context, candidates, mask, _ = decision(KIND=Kind.REALLOCATE, CHOICE=1, scores=False)
    candidates[1, Col.INSTANCE], candidates[1, Col.NEW_ROLE] = 2, 1
    ring = Ring(tmp_path / "ring", 4096)
    ring.put(numbers, context, candidates, mask, np.zeros(0))
    line = Lines().decision(ring.take()[0])
    assert (line["kind"], line["action"]) == ("reallocate", "instance 2 to decode")


def test_a_log_that_cannot_be_written_is_an_error_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SlalomError, match="decision log"):
        DecisionLog(tmp_path / "file" / "log.jsonl")


def test_rotation_without_old_files(tmp_path: Path) -> None:
    file = Rotated(tmp_path / "log", 10, 0)
    file.write([b"12345678\n", b"abcdefgh\n"])
    file.close()
    assert (tmp_path / "log").read_bytes() == b"abcdefgh\n"


def test_the_writer_s_process_does_without_torch() -> None:
    """It is started beside every guarded server, and again where it dies: what it imports is time and memory."""
    check = "import sys, policies.guard.log.writer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0
