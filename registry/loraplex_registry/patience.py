"""Waiting as long as a registry server asks for (429), while there is patience for it. Sends nothing itself."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from .errors import RateLimited

PATIENCE_SECONDS = 300.0
FIRST_PAUSE_SECONDS = 0.05
T = TypeVar("T")


def silent(_error: RateLimited) -> None:
    """Say nothing about a wait."""


@dataclass(frozen=True)
class Patience:
    """How long one act may wait in all, and who is told of each wait before it begins."""

    seconds: float = PATIENCE_SECONDS
    told: Callable[[RateLimited], None] = silent

    def through(self, act: Callable[[], T]) -> T:
        """What the act gives, which is tried again whenever it was refused and the time it was given is over.

        Where it was given none, after pauses that grow. Raises RateLimited when that would take longer than there is
        patience for, and whatever else the act raises.
        """
        began, unasked_seconds = time.monotonic(), FIRST_PAUSE_SECONDS
        while True:
            try:
                return act()
            except RateLimited as error:
                waited_seconds = time.monotonic() - began
                pause_seconds = error.retry_after_seconds or unasked_seconds
                if waited_seconds + pause_seconds > self.seconds:
                    raise RateLimited(error.limit, error.retry_after_seconds, round(waited_seconds)) from error
                self.told(error)
                time.sleep(pause_seconds)
                unasked_seconds *= 2
