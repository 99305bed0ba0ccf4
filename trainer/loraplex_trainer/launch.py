"""What torchrun tells a process of itself, by its environment. Knows no torch: a mistake is answered at once."""

import os
from dataclasses import dataclass

from loraplex_trainer.errors import ConfigError


@dataclass(frozen=True)
class Launch:
    """One process of `size`, the `local_rank`-th of its machine."""

    rank: int
    size: int
    local_rank: int


def read_launch() -> Launch:
    """One process alone where torchrun started none. Raises ConfigError for what torchrun does not say."""
    if "RANK" in os.environ:
        for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ConfigError(
                    f"the environment has RANK={os.environ['RANK']} and no {name}, which torchrun sets too: start with "
                    "torchrun, or unset RANK"
                )
    launch = Launch(_number("RANK", 0), _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0))
    if launch.rank >= launch.size:
        raise ConfigError(
            f"the environment has RANK={launch.rank}, and WORLD_SIZE={launch.size}: expected a rank below that"
        )
    return launch


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ConfigError(f"the environment has {name}={value!r}: a whole number is expected, as torchrun sets it")
    return int(value)
