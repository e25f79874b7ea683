"""The core at work on the wall clock: instances, their steps, transfers, the engine above them."""
