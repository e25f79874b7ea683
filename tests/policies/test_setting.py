"""A setting read off a cluster's state."""

from __future__ import annotations

import numpy as np

from engine.core import state
from engine.core.columns import Kind
from engine.core.kinds import Role
from engine.latency.evaluate import PROFILE, SHARE, TICKS_PER_S
from policies.rule import Setting


def test_a_setting_repeats_what_the_state_says() -> None:
    cluster, inst = np.zeros(1, state.CLUSTER), np.zeros(3, state.INSTANCE)
    pool, cls = np.zeros(2, state.POOL), np.zeros(2, state.SLO_CLASS)
    cluster["block_tokens"], cluster["ask_realloc"], cluster["allow_shed"] = 16, 1, 1
    cluster["control_ticks"] = TICKS_PER_S // 2
    inst["role"], inst["gpu"], inst["pool"] = [Role.PREFILL, Role.DECODE, Role.MIXED], [0, 0, 5], [0, 0, 1]
    pool["n_blocks"] = [100, 200]
    cls["weight"], cls["ttft_s"], cls["tpot_s"] = [1, 2], [0.5, 1.0], [0.05, 0.1]
    used = {
        "cluster": cluster,
        "inst": inst,
        "pool": pool,
        "cls": cls,
        "profile": np.zeros(1, PROFILE),
        "share": np.zeros((1, 1), SHARE),
    }
    unused = dict.fromkeys(state.ClusterState._fields, np.zeros(0, np.int64))
    cluster_state = state.ClusterState(**(unused | used))
    read = Setting.of_state(cluster_state, mean_prompt=300.0)
    assert (read.n_instances, read.gpus, read.roles) == (3, 2, (0, 1, 2))
    assert read.kv_tokens == (1600, 1600, 3200)
    assert read.kinds == {Kind.PLACE_PREFILL, Kind.PLACE_DECODE, Kind.REALLOCATE}
    assert (read.allow_hold, read.allow_shed, read.control_s) == (False, True, 0.5)
    assert read.classes[1] == (2.0, 1.0, 0.0, 0.1)
    assert (read.mean_prompt, read.mean_output) == (300.0, 0.0)
