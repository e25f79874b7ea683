"""Files appear whole or not at all."""

import errno
import os

import pytest

from engine.common.appends import append_line, heal
from engine.common.files import claim, kept, read_json, write_json
from engine.errors import SlalomError


def test_a_full_disk_is_a_clear_message_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SlalomError, match="disk is full"):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_place_that_cannot_be_written_is_a_clear_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SlalomError, match=r"choose a folder that can be written \(it is a file\)"):
        write_json(tmp_path / "file" / "result.json", {})
    with pytest.raises(SlalomError, match=r"choose a folder that can be written \(it is a file\)"):
        claim(tmp_path / "file")


def test_nan_never_reaches_a_file(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_resumed_from_is_sealed(tmp_path):
    path = tmp_path / "point.json"
    value = {"rate": 8.25, "good": [1, 2, 3], "name": "x"}
    write_json(path, value, sealed=True)
    assert read_json(path) == value
    path.write_text(path.read_text().replace("8.25", "8.75"))
    with pytest.raises(SlalomError, match="has changed"):
        read_json(path)


def test_what_is_kept_is_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"n": len(made)}

    path = tmp_path / "kept.json"
    assert [kept(path, make), kept(path, make)] == [{"n": 1}] * 2
    assert [kept(None, make), kept(None, make)] == [{"n": 2}, {"n": 3}]
    path.write_text(path.read_text().replace("1", "2", 1))
    with pytest.raises(SlalomError, match="has changed"):
        kept(path, make)


@pytest.mark.parametrize("end", [b'{"cut', b"\0" * 4096, b'{"cut' + b"\0" * 70_000])
def test_a_file_of_lines_is_mended_before_more_is_written(tmp_path, end):
    path = tmp_path / "lines"
    path.write_bytes(b'{"a": 1}\n' * 9000 + end)
    assert heal(path) == len(end)
    append_line(path, b'{"b": 2}')
    assert path.read_bytes() == b'{"a": 1}\n' * 9000 + b'{"b": 2}\n'
    assert heal(path) == heal(tmp_path / "none") == 0
    path.write_bytes(end)
    assert heal(path) == len(end)
    assert path.read_bytes() == b""


def test_a_line_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, write = tmp_path / "lines", os.write
    append_line(path, b"whole")

    def full(handle, data):
        if len(data) < 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data[:3])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(SlalomError, match="disk is full"):
        append_line(path, b"half", sync=True)
    assert path.read_bytes() == b"whole\n"
