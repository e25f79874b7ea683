"""Workloads: what arrives, when, how long, and what of it was seen before.

``spec.py`` documents the ``workload:`` section of a scenario; ``parse_workload(section).build(rate, n, seed,
split)`` gives a ``Trace`` (``trace.py``), the columns the surrogate and the load generator read. Readers of
public trace formats are in ``readers.py``. Nothing here knows instances, policies or latencies.
"""

from env.workload.base import SPLIT_NAMES, Split, WorkloadBase
from env.workload.readers import FORMATS, read_trace
from env.workload.spec import WorkloadSpec, parse_workload
from env.workload.trace import Trace, assign_classes, concat, merge, scale_rate
from env.workload.writer import write_trace

__all__ = [
    "FORMATS",
    "SPLIT_NAMES",
    "Split",
    "Trace",
    "WorkloadBase",
    "WorkloadSpec",
    "assign_classes",
    "concat",
    "merge",
    "parse_workload",
    "read_trace",
    "scale_rate",
    "write_trace",
]
