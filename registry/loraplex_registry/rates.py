"""How many requests each asker may make: token buckets, of which only a bounded number is remembered.

Knows no HTTP and no tokens: `auth` says who asks.
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from .errors import InvalidRequest

BUCKETS = 10_000
_UNITS = {"s": 1, "min": 60, "h": 3600}
_RATE = re.compile(rf"([1-9][0-9]{{0,8}})/({'|'.join(_UNITS)})")


@dataclass(frozen=True)
class Rate:
    """So many requests in so many seconds: that many at once, and then as they come back, evenly."""

    requests: int
    seconds: int

    @classmethod
    def parse(cls, text: str) -> "Rate":
        """Read `600/min`. Raises InvalidRequest."""
        found = _RATE.fullmatch(text)
        if not found:
            raise InvalidRequest(f"the rate limit is '{text}', expected a number and /s, /min or /h, as 600/min")
        return cls(int(found[1]), _UNITS[found[2]])

    def __str__(self) -> str:
        return f"{self.requests}/{next(unit for unit, seconds in _UNITS.items() if seconds == self.seconds)}"


class Buckets:
    """One bucket for each key, full at first. Used on one thread.

    A bucket that nobody touched for the rate's time is full again, and so the same as none: the one that was touched
    longest ago is forgotten first.
    """

    def __init__(self, rate: Rate, most: int = BUCKETS, clock: Callable[[], float] = monotonic) -> None:
        self.rate, self._most, self._clock = rate, most, clock
        self._held: OrderedDict[str, tuple[float, float]] = OrderedDict()  # key → what it held, and when

    def __len__(self) -> int:
        return len(self._held)

    def take(self, key: str) -> float:
        """Take one request out of the key's bucket. Returns 0, or the seconds until there is one, and takes none."""
        now, per_second = self._clock(), self.rate.requests / self.rate.seconds
        held, at = self._held.pop(key, (float(self.rate.requests), now))
        held = min(held + (now - at) * per_second, float(self.rate.requests))
        wait_seconds = 0.0 if held >= 1 else (1 - held) / per_second
        self._held[key] = (held if wait_seconds else held - 1, now)
        if len(self._held) > self._most:
            self._held.popitem(last=False)
        return wait_seconds
