"""The engine's limits, each with its default written once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineConfig:
    """Bounds on memory and work. Sizes in tokens, rows or bytes, as named."""

    max_loras: int = 8  # adapters on the device
    max_host_loras: int = 32  # adapters in host memory, those on the device included
    max_host_bytes: int = 8 << 30  # of all adapters in host memory
    load_share: float = 0.1  # of the time goes to adapters on their way to host and device; more if many wait
    max_rank: int = 64
    max_rows: int = 16  # requests running at once
    max_waiting: int = 256  # requests queued; one more is refused
    step_tokens: int = 512  # tokens of one step: longer prompts are cut into chunks
    max_model_len: int | None = None  # tokens of prompt and completion together; None: what the base allows
    kv_cache_bytes: int = 1 << 30
    page_tokens: int = 16
    check_goldens: bool = True  # an adapter has to answer the golden prompts of its receipt before it answers others
    prefix_cache: bool = True  # share the pages of requests that begin alike under one adapter
    lean: bool = False  # True: keep one layout of 4-bit weights on a CPU, and be slow with many rows
    paged: bool = True  # False: the slow reference runner
    kernels: bool = True  # False: torch and bitsandbytes alone, the slow reference of our own kernels
    cuda_graphs: bool = True  # on a CUDA device: replay decode steps
