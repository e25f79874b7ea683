"""Every check and measurement that needs a GPU, in one command, into one JSON file (``docs/gpu.md``).

``catalogue`` says what is measured, in which order and how long it may take; ``__main__`` runs each group in a child
process, which ``group`` is; ``report`` is the file. ``rig`` is the device or, for ``--dry-run``, a CPU behind the same
calls. A kernel that hangs or breaks the CUDA context costs its own group's open cases and nothing else. All groups but
``loop``, which runs the product's commands, need torch, triton, numpy, numba, safetensors and tokenizers only.
"""
