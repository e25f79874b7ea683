"""Writing results: atomically, by one process at a time, and with a clear message when the disk is full."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from engine.common import documents
from engine.common.regular import LARGE
from engine.errors import SlalomError

_SUM = "content_sha256"
#: Folders that this process has claimed, and the files whose locks it holds.
_CLAIMED: dict[Path, IO[str]] = {}


def claim(folder: Path) -> None:
    """Make ``folder`` and keep it for this process until it ends, however it ends; claiming twice is harmless.

    :raises SlalomError: another process works there, or the place cannot be written
    """
    try:
        place = folder.resolve()
        if place in _CLAIMED:
            return
        place.mkdir(parents=True, exist_ok=True)
        file = (place / ".lock").open("a+")
    except (OSError, ValueError) as error:  # a path with a null byte
        raise SlalomError("--out", str(folder), _elsewhere(error)) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # children do not inherit it
    except BlockingIOError:
        file.seek(0)
        who = file.read().strip() or "unknown"
        file.close()
        fix = f"process {who} is working there: wait for it, or name another folder"
        raise SlalomError("--out", str(folder), fix) from None
    except OSError:
        pass  # a file system without locks
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    _CLAIMED[place] = file


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    :raises SlalomError: the disk is full or the place cannot be written; nothing is left behind
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, ValueError) as error:  # a path with a null byte
        with suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "the disk is full: free some space and repeat, with --resume where the command has it"
        else:
            fix = _elsewhere(error)
        raise SlalomError("output file", str(path), fix) from error


def _elsewhere(error: OSError | ValueError) -> str:
    """The remedy for a place that cannot be written; a file where a folder should be made "exists", says mkdir."""
    why = "it is a file" if isinstance(error, FileExistsError) else getattr(error, "strerror", None) or error
    return f"choose a folder that can be written ({why})"


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, sealed: bool = False) -> None:
    """Write one JSON document, see :func:`write_bytes`.

    :param sealed: an object gets the sum of its content, which :func:`read_json` checks: for what is resumed from
    """
    if sealed:
        value = {**value, _SUM: digest_of(value)}
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read one JSON document.

    :raises SlalomError: missing, unreadable, not JSON, or other than it was when it was sealed
    """
    try:
        value = documents.read_json(path, "result file", LARGE)
    except SlalomError as error:
        raise SlalomError("result file", str(path), f"delete it or choose another folder ({error})") from error
    if isinstance(value, dict) and _SUM in value:
        seal = value.pop(_SUM)
        if seal != digest_of(value):
            raise SlalomError("result file", str(path), "its content has changed since it was written: delete it")
    return value


def kept(path: Path | None, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``path`` holds, of which ``make`` is asked first where it is not there; None: nothing is kept.

    :raises SlalomError: as :func:`read_json` and :func:`write_bytes`
    """
    if path is not None and path.exists():
        found: dict[str, Any] = read_json(path)
        return found
    made = make()
    if path is not None:
        write_json(path, made, sealed=True)
    return made


def digest_of(value: Any) -> str:
    """Digest of a value that JSON can hold: part of the names of what is kept."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
