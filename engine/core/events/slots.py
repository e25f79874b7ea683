"""The event slots of a cluster: one number for each thing that can happen. On a tie the lower one goes first."""

from __future__ import annotations

from typing import NamedTuple

from engine.jit.kernel import kernel


class Slots(NamedTuple):
    """Where each kind begins. The lanes come first: lane (i, l) of N instances has slot 2 i + l."""

    links: int  # end of the 2 N lanes; link k has slot ``links + k``
    switches: int  # role change of instance i: slot ``switches + i``
    deadline: int  # a first token is late; only a simulated clock waits for that
    control: int  # a control interval ends
    hold: int  # held requests are asked for again
    arrival: int  # something comes from outside
    total: int


@kernel(forceinline=True)
def slots_of(n, links):
    """The slots of ``n`` instances and ``links`` links; for kernels and for Python."""
    switches = 2 * n + links
    first = switches + n
    return Slots(2 * n, switches, first, first + 1, first + 2, first + 3, first + 4)
