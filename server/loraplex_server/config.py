"""What the server is told at its start, in one frozen object. Defaults stand here and in EngineConfig, nowhere else."""

from dataclasses import dataclass, field
from pathlib import Path

from loraplex_server.engine.config import EngineConfig


@dataclass(frozen=True)
class ServerConfig:
    """How a server is assembled. ``registry`` is a folder or a URL; None means the default folder."""

    base: str
    revision: str | None = None
    quantization: str = "nf4"
    device: str = "auto"
    dtype: str = "auto"
    registry: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_body_bytes: int = 4 << 20
    metrics_adapters: int = 100  # adapter names that get series of their own
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
