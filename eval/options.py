"""Options of several commands, read from text."""

from __future__ import annotations

from engine.errors import SlalomError

__all__ = ["parse_rates"]


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
