"""The one reader of files of lines: plain or packed, with limits, and an end that is an error where it breaks off."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from engine.common.regular import LARGE, check_regular
from engine.errors import SlalomError

LONGEST_LINE = 16 * 2**20
#: A packed file may unpack to so many times its size, or to _ROOM characters; logs and traces reach a third of that.
_UNPACKED = 50
_ROOM = 64 * 2**20


def lines(path: Path, field: str = "path") -> Iterator[str]:
    """Lines of a UTF-8 text file, their ends included, unpacked where it is gzip.

    :param field: who asked for the file, where it is missing
    :raises SlalomError: missing, no regular file, no text, a line of 16 MiB, cut in the middle of packed data, more
        than 2 GiB, or far more text than a file of that size can hold
    """
    number = size = 0
    check_regular(path, LARGE)
    try:
        most = LARGE
        with path.open("rb") as probe:
            packed = probe.read(2) == b"\x1f\x8b"
        if packed:
            most = min(LARGE, max(_ROOM, _UNPACKED * path.stat().st_size))
        with gzip.open(path, "rt", encoding="utf-8") if packed else path.open(encoding="utf-8") as stream:
            while line := stream.readline(LONGEST_LINE):
                number += 1
                size += len(line)
                if len(line) == LONGEST_LINE or size > most:
                    break
                yield line
    except FileNotFoundError as error:
        raise SlalomError(field, str(path), "give a file that exists") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SlalomError(f"{path.name}: after line {number}", str(error), "fetch the file again, it is cut") from error
    except (OSError, ValueError) as error:
        raise SlalomError(f"{path.name}: after line {number}", str(error), "give a readable UTF-8 text file") from error
    if size > most:
        raise SlalomError(f"{path.name}: after line {number}", f"{size} characters", f"at most {most} are read")
    if len(line) == LONGEST_LINE:
        raise SlalomError(f"{path.name}: line {number}", line[:40], f"a line has less than {LONGEST_LINE} characters")
