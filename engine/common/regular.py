"""Files that a user names: only regular ones are read, and none that is larger than its kind can be.

A FIFO would block whoever reads it, a device or a sparse file of gigabytes would fill the memory.
"""

from __future__ import annotations

import stat
from pathlib import Path

from engine.errors import SlalomError

#: Bytes of a file that is written by hand or describes something: settings, scenarios, profiles, manifests.
SMALL = 64 * 2**20
#: Bytes of a file with data: weights of a policy, traces, logs.
LARGE = 2**31


def check_regular(path: Path | str, most: int = SMALL) -> None:
    """Look at a file before it is read. That it is missing, its reader says.

    :raises SlalomError: it is no regular file, or has more than ``most`` bytes
    """
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(found.st_mode):
        raise SlalomError(str(path), stat.filemode(found.st_mode), "give a regular file")
    if found.st_size > most:
        raise SlalomError(str(path), f"{found.st_size} bytes", f"a file of this kind has at most {most}")
