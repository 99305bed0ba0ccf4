"""Where the server is and how to speak to it: arguments, then environment, then defaults. Opens no connection."""

import os
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_SECONDS = 120.0
CONNECT_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Settings:
    """The resolved settings of one client."""

    base_url: str
    api_key: str | None = field(repr=False)
    timeout_seconds: float
    max_retries: int

    @classmethod
    def resolve(cls, base_url: str | None, api_key: str | None, timeout: float, max_retries: int) -> "Settings":
        """Fills what is None from LORAPLEX_URL and LORAPLEX_API_KEY. Raises ValueError naming the setting."""
        url = base_url or os.environ.get("LORAPLEX_URL") or DEFAULT_URL
        if not url.startswith(("http://", "https://")) or not _host(url):
            raise ValueError(f"base_url: expected http://host[:port] or https://…, got {url!r}")
        key = (api_key or os.environ.get("LORAPLEX_API_KEY") or "").strip()
        if not (key.isascii() and key.isprintable()):  # never shown: it is a secret
            raise ValueError("api_key: expected printable ASCII characters on one line")
        if not timeout > 0:
            raise ValueError(f"timeout: expected seconds above 0, got {timeout!r}")
        if max_retries < 0:
            raise ValueError(f"max_retries: expected 0 or more, got {max_retries!r}")
        # The openai SDK wants the /v1; who copies its base_url here means the same server.
        return cls(url.rstrip("/").removesuffix("/v1"), key or None, timeout, max_retries)

    def httpx_options(self) -> dict[str, Any]:
        """Arguments that httpx.Client and httpx.AsyncClient share."""
        headers = {"User-Agent": f"loraplex-python/{installed_version()}"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return {
            "base_url": self.base_url,
            "headers": headers,
            "timeout": httpx.Timeout(self.timeout_seconds, connect=min(self.timeout_seconds, CONNECT_TIMEOUT_SECONDS)),
            # Idle connections end before uvicorn's own five seconds, or a request could meet a closing one.
            "limits": httpx.Limits(max_connections=1000, max_keepalive_connections=100, keepalive_expiry=4.0),
        }


def installed_version() -> str:
    """The version of the installed distribution; "0+source" when the project runs from a source tree."""
    try:
        return metadata.version("loraplex")
    except metadata.PackageNotFoundError:
        return "0+source"


def _host(url: str) -> str:
    try:
        return httpx.URL(url).host
    except httpx.InvalidURL:
        return ""
