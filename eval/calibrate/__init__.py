"""The ``calibrate`` command: a profile from our engine, or from the request log of another."""
