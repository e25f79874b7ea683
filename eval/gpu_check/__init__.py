"""``make gpu-check``: every check and measurement that needs a GPU, in one command, into one JSON file.

``rig`` is the device (or, for ``--dry-run``, a CPU behind the same calls), ``catalogue`` says what is measured, in
which order and how long it takes, ``__main__`` runs it in child processes: a kernel that hangs or breaks the CUDA
context costs its own group and nothing else. Needs torch, triton and numpy; only ``engine`` needs all of Slalom.
"""
