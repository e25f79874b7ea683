"""Files of lines that are only ever appended to: whatever a crash or a full disk leaves at their end is mended."""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from engine.errors import SlalomError

_log = logging.getLogger("slalom.files")
_AT_ONCE = 65536


def whole_bytes(file: BinaryIO) -> int:
    """Bytes up to the end of the last whole line of an open file; its position is lost."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        begin = max(end - _AT_ONCE, 0)
        file.seek(begin)
        at = file.read(end - begin).rfind(b"\n")
        if at >= 0:
            return begin + at + 1
        end = begin
    return 0


def heal(path: Path) -> int:
    """Cut off what follows the last whole line: half a line, or the zero bytes that a power loss leaves.

    :return: bytes cut off; 0 where there is no file
    :raises SlalomError: the file cannot be changed
    """
    try:
        with open(path, "r+b") as file:
            end = whole_bytes(file)
            lost = file.seek(0, os.SEEK_END) - end
            if lost:
                file.truncate(end)
                os.fsync(file.fileno())
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise SlalomError("file", str(path), f"choose one that can be written ({error.strerror})") from error
    if lost:
        _log.warning("%s: its last line was cut off in the middle; it is left out", path)
    return lost


def append_line(path: Path, line: bytes, *, sync: bool = False) -> None:
    """Append ``line`` (without its end) whole or not at all.

    :param sync: it is on the disk before this returns
    :raises SlalomError: the disk is full or the place cannot be written
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            before, rest = os.fstat(handle).st_size, line + b"\n"
            try:
                while rest:
                    rest = rest[os.write(handle, rest) :]
            except OSError:
                with suppress(OSError):
                    os.ftruncate(handle, before)
                raise
            if sync:
                os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "the disk is full: free some space" if full else f"choose a place that can be written ({error.strerror})"
        raise SlalomError("file", str(path), fix) from error
