"""loraplex's Python SDK: completions from many adapters over one base. Knows the server by its HTTP surface alone."""

from .client import AsyncClient, Client
from .errors import (
    AdapterNotFound,
    AdapterRefused,
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    BadRequest,
    LoraplexError,
    RateLimited,
    ServerError,
    Unauthorized,
)
from .records import Chunk, Completion, Model, Usage

__all__ = [
    "APIConnectionError",
    "APIResponseError",
    "APIStatusError",
    "APITimeoutError",
    "AdapterNotFound",
    "AdapterRefused",
    "AsyncClient",
    "BadRequest",
    "Chunk",
    "Client",
    "Completion",
    "LoraplexError",
    "Model",
    "RateLimited",
    "ServerError",
    "Unauthorized",
    "Usage",
]
