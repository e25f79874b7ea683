"""Options of several commands, read from text."""

from __future__ import annotations

import re

from engine.errors import SlalomError

_MOST_RATES = 1_000


def parse_rates(text: str) -> tuple[float, ...]:
    """``start:stop:step`` (both ends included) or ``rate,rate,...``, requests per second.

    :raises SlalomError: not numbers, not positive, or an empty range
    """
    fix = "write START:STOP:STEP or RATE,RATE,... in requests per second, all above 0"
    try:
        numbers = [float(part) for part in text.replace(":", ",").split(",")]
    except ValueError:
        raise SlalomError("--rates", text, fix) from None
    if not all(0.0 < n < 1e9 for n in numbers):
        raise SlalomError("--rates", text, fix)
    if ":" not in text:
        return tuple(sorted(set(numbers)))
    if text.count(":") != 2 or "," in text or numbers[1] < numbers[0]:
        raise SlalomError("--rates", text, fix)
    start, stop, step = numbers
    count = int((stop - start) / step * (1 + 1e-12) + 1e-9) + 1
    if count > _MOST_RATES:
        raise SlalomError("--rates", text, f"that is more than {_MOST_RATES} rates; take larger steps")
    return tuple(start + step * i for i in range(count))


def parse_requests(text: str | None) -> float:
    """``500k``, ``3M``, ``100000``: simulated requests; without bound where nothing is asked.

    :raises SlalomError: anything else
    """
    if text is None:
        return float("inf")
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", text.strip())
    if found is None or float(found[1]) <= 0:
        raise SlalomError("--tune-requests", text, "write a number of requests, e.g. 500k or 3M")
    return float(found[1]) * {"": 1, "k": 1e3, "M": 1e6}[found[2]]
