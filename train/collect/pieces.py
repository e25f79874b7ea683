"""Objects of some megabytes as pieces that Ray sends inside its messages.

What a task returns, or is given, goes from process to process inside the message itself if it is small (100 KB each,
10 MB a message: Ray's ``max_direct_call_object_size`` and ``task_rpc_inlined_bytes_limit``). Anything larger goes
through the object stores of both nodes, and each of their raylets copies it several times: for a rollout of 6 MB that
took a quarter of the time it took to collect it. So a rollout is cut into pieces that are small enough.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

_PIECE = 96 * 1024  # bytes, below the 100 KB that Ray sends in a message
_MOST = 96  # pieces in one message: 9 MiB of the 10
_ALIGN = 64  # arrays begin at multiples of this many bytes


def pieces_for(size: int) -> int:
    """How many pieces to ask for where some ``size`` bytes are expected; 2 if they are too many for a message."""
    body = -(-size // _PIECE)
    return 2 if body > _MOST else max(body, 1) + 1


def cut(value: Any, pieces: int | None = None) -> list[bytes]:
    """``value`` pickled into so many pieces, for :func:`join`; if they would be too large, all is in the second.

    :param pieces: 2 or more; None: as many as it takes
    """
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts: list[Any] = []
    lengths = []
    for buffer in buffers:
        raw = buffer.raw()
        lengths.append(raw.nbytes)
        parts += [raw, bytes(-raw.nbytes % _ALIGN)]
    body = memoryview(b"".join(parts))
    pieces = pieces or pieces_for(len(body))
    step = _PIECE if len(body) <= (pieces - 1) * _PIECE else len(body)
    return [pickle.dumps((head, lengths)), *(bytes(body[at * step : (at + 1) * step]) for at in range(pieces - 1))]


def join(pieces: Sequence[bytes]) -> Any:
    """Inverse of :func:`cut`; arrays are views, not to be written to."""
    head, lengths = pickle.loads(pieces[0])
    body, at, views = memoryview(b"".join(pieces[1:])), 0, []
    for length in lengths:
        views.append(body[at : at + length])
        at += length + -length % _ALIGN
    return pickle.loads(head, buffers=views)
