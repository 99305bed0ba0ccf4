"""When to ask again, and after how long. Decides only: the clients do the waiting."""

import random

import httpx

from .errors import APIConnectionError, APIStatusError, APITimeoutError, LoraplexError

FIRST_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 8.0
MAX_RETRY_AFTER_SECONDS = 60.0


class Retries:
    """The attempts of one call. Backoff with full jitter, so that clients turned away together do not return together.

    Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """

    def __init__(self, max_retries: int) -> None:
        self._left = max_retries
        self._backoff_seconds = FIRST_BACKOFF_SECONDS

    def wait_seconds(self, error: LoraplexError) -> float:
        """How long to wait before the next attempt; raises `error` when there shall be none.

        A server that asks for more than MAX_RETRY_AFTER_SECONDS is not asked again: to return sooner would be rude,
        and to sleep that long inside a call a surprise. The error's `retry_after` tells the caller.
        """
        retry_after = (error.retry_after or 0.0) if isinstance(error, APIStatusError) else 0.0
        if not self._left or not _is_passing(error) or retry_after > MAX_RETRY_AFTER_SECONDS:
            raise error
        self._left -= 1
        jitter = random.uniform(0, self._backoff_seconds)
        self._backoff_seconds = min(2 * self._backoff_seconds, MAX_BACKOFF_SECONDS)
        return retry_after + jitter


def _is_passing(error: LoraplexError) -> bool:
    """Only where the server did no work yet: whether to pay twice for a lost answer is the caller's call."""
    if isinstance(error, APIStatusError):
        return error.status in (429, 503)
    never_connected = (httpx.ConnectError, httpx.ConnectTimeout)
    return isinstance(error, APIConnectionError | APITimeoutError) and isinstance(error.__cause__, never_connected)
