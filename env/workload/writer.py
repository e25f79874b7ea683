"""Writer of our superset of Mooncake JSON Lines (``format: slalom``), which other tools read too."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from env.workload.trace import Trace


def write_trace(trace: Trace, path: str | Path, classes: tuple[str, ...] = ()) -> None:
    """Write atomically; ``.gz`` compresses. Reading back gives the same columns, times to the nanosecond.

    Block ids are the chained hashes themselves, so equal prefixes stay equal; ids after re-reading differ
    in value, not in structure. ``n_roots`` rows come first, then turns with ``session_id`` and ``delay_ms``.

    :param classes: names to write instead of class indices
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as raw:
            if path.suffix == ".gz":
                with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
                    packed.writelines(_encoded(trace, classes))
            else:
                raw.writelines(_encoded(trace, classes))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _encoded(trace: Trace, classes: tuple[str, ...]) -> Iterator[bytes]:
    owner = trace.owner()
    parent = np.full(trace.n, -1)
    with_next = np.flatnonzero(trace.next_turn >= 0)
    parent[trace.next_turn[with_next]] = with_next
    for i in range(trace.n):
        row: dict[str, Any] = {}
        if parent[i] < 0:
            row["timestamp"] = round(float(trace.arrival_s[i]) * 1e3, 6)
        else:
            row["delay_ms"] = float(trace.think_s[parent[i]]) * 1e3
        row["input_length"] = int(trace.prompt[i])
        row["output_length"] = int(trace.output[i])
        if trace.hash_tokens:
            first = int(trace.hash_start[i])
            row["hash_ids"] = trace.hashes[first : first + int(trace.hash_n[i])].tolist()
            row["hash_tokens"] = trace.hash_tokens
        if parent[i] >= 0 or trace.next_turn[i] >= 0:
            row["session_id"] = f"s{owner[i]}"
        if classes or trace.bound or trace.cls[i]:
            row["class"] = classes[trace.cls[i]] if classes else int(trace.cls[i])
        for column, key in (("ttft_s", "slo_ttft_ms"), ("tpot_s", "slo_tpot_ms")):
            target = float(getattr(trace, column)[i])
            if not np.isnan(target):
                row[key] = target * 1e3
        yield (json.dumps(row, separators=(",", ":")) + "\n").encode()
