"""What the server is told at its start, in one frozen object. Defaults stand here and in EngineConfig, nowhere else."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from loraplex_registry.signing import PublicKey
from loraplex_server.engine.config import EngineConfig


@dataclass(frozen=True)
class ServerConfig:
    """How a server is assembled. ``registry`` is a folder or a URL; None means the default folder."""

    base: str
    revision: str | None = None
    quantization: str = "nf4"
    double_quantization: bool = True  # of nf4 and fp4: their scales are kept in 8 bits
    device: str = "auto"
    dtype: str = "auto"
    registry: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    signed_by: tuple[PublicKey, ...] = ()  # an adapter has to be signed by one of these keys; none: by nobody
    max_body_bytes: int = 4 << 20
    request_timeout: float = 0  # seconds a completion may take, its time in the queue included; 0: no limit
    drain_seconds: int = 120  # what runs when the server is told to stop has so long to finish
    metrics_adapters: int = 100  # adapter names that get series of their own
    adapter_weights: Mapping[str, float] = field(default_factory=dict)  # by name, "base" is the base; others weigh 1
    engine: EngineConfig = field(default_factory=EngineConfig)


def read_api_keys(file: Path | None, inline: str | None) -> tuple[str, ...]:
    """The accepted bearer keys: one a line in a file, or separated by commas; blank lines and # comments are skipped.

    Raises:
        ValueError: a file was given that holds no key.
    """
    lines = file.read_text().splitlines() if file else []
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if file and not keys:
        raise ValueError(f"api-key-file {str(file)!r} holds no key, expected one a line")
    return tuple(dict.fromkeys(keys + [key.strip() for key in (inline or "").split(",") if key.strip()]))


def read_adapter_weights(pairs: Iterable[str]) -> dict[str, float]:
    """Shares of the service by adapter, each as NAME=NUMBER.

    Raises:
        ValueError: a pair is something else, its number is not above 0, or a name comes twice.
    """
    weights: dict[str, float] = {}
    for pair in pairs:
        name, _, number = pair.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not name or not 0 < weight < inf:
            raise ValueError(f"adapter-weight is {pair!r}, expected NAME=NUMBER with a number above 0")
        if name in weights:
            raise ValueError(f"adapter-weight names {name!r} twice, expected each adapter once")
        weights[name] = weight
    return weights
