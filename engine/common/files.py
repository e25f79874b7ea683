"""Writing results: atomically, and with a clear message when the disk is full."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.errors import SlalomError

__all__ = ["read_json", "write_bytes", "write_json", "write_text"]


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
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "the disk is full: free some space and repeat with --resume; finished points are kept"
        else:
            fix = f"choose a folder that can be written ({error.strerror})"
        raise SlalomError("output file", str(path), fix) from error


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, see :func:`write_bytes`."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read one JSON document.

    :raises SlalomError: missing, unreadable or not JSON
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SlalomError("result file", str(path), f"delete it or choose another folder ({error})") from error
