"""Where a step runs: a device cut into partitions (CPU cores, SMs), and the lanes of an instance on them."""
