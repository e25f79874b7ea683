"""Files appear whole or not at all."""

import errno
import os

import pytest

from engine.common.files import read_json, write_json
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
    with pytest.raises(SlalomError, match="choose a folder"):
        write_json(tmp_path / "file" / "result.json", {})


def test_nan_never_reaches_a_file(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", float("nan"))
    assert list(tmp_path.iterdir()) == []
