"""An adapter in host memory: read from a folder, checked whole against the base, ready to be put on the device."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig

from loraplex_registry.base import BaseDescription
from loraplex_registry.errors import InvalidAdapter
from loraplex_registry.tensors import TensorInfo, mapped, read_header
from loraplex_registry.validate import WEIGHTS, Limits, check_adapter
from loraplex_server.engine.errors import AdapterRefused

_PIECE = 1 << 14  # values; torch computes as few on the thread that asks
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # all that check_adapter lets pass


@dataclass(frozen=True)
class HostAdapter:
    """The tensors of one adapter, keyed as in its file, and the configuration peft builds its layers from."""

    key: str  # what the engine calls it: a digest, or a local name
    config: LoraConfig
    tensors: dict[str, torch.Tensor]

    @cached_property
    def host_bytes(self) -> int:
        """Memory the tensors take."""
        return sum(t.nbytes for t in self.tensors.values())


def read_adapter(
    key: str,
    folder: Path,
    base: BaseDescription,
    max_rank: int,
    pin: bool = False,
    dtype: torch.dtype | None = None,
) -> HostAdapter:
    """Read an adapter folder that fits ``base``; ``pin`` locks its pages, from where a CUDA device copies by itself.

    ``dtype``: what the tensors are to become, so that a CPU has nothing to copy when it uses them; None: they stay.

    Raises:
        AdapterRefused: it is not a LoRA adapter this server can use whole on this base; the message says why.
    """
    try:
        check_adapter(folder, base, Limits(max_rank=max_rank), files=())  # their digests are not asked for
    except InvalidAdapter as error:
        raise AdapterRefused(str(error)) from error
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)  # check_adapter refuses every other kind
    config.inference_mode = True
    # Not by safetensors' torch side: get_tensor, in 0.8.0, never frees two small objects of each tensor it reads.
    weights = folder / WEIGHTS
    with mapped(weights) as view:
        held = {k: _in_memory(k, info, view, pin, dtype) for k, info in read_header(weights).items()}
    return HostAdapter(key, config, held)


def _in_memory(key: str, info: TensorInfo, view: memoryview, pin: bool, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor of a mapped file, copied: read here, on a background thread, not when it is first used.

    By numpy, or in small pieces: torch would start threads, and they compete with the engine's.
    """
    stored = _DTYPES[info.dtype]
    held = torch.empty(info.shape, dtype=dtype or stored, pin_memory=pin)
    with view[info.begin : info.end] as data:
        if held.dtype == stored:
            np.copyto(_bytes(held), np.frombuffer(data, np.uint8))
        elif not _cast(np.frombuffer(data, np.uint8), stored, held.view(-1)):
            most = torch.finfo(held.dtype).max
            raise AdapterRefused(f"tensor {key!r} holds values beyond {most:.3g}, the most of {held.dtype}")
    return held


def _cast(given: np.ndarray, stored: torch.dtype, held: torch.Tensor) -> bool:
    """Fill a flat tensor from the bytes of finite values of another dtype; False when it cannot hold one of them."""
    values, size = torch.empty(_PIECE, dtype=stored), stored.itemsize
    for first in range(0, len(held), _PIECE):
        piece = held[first : first + _PIECE]
        read = values[: len(piece)]
        np.copyto(_bytes(read), given[first * size : (first + len(piece)) * size])
        if not piece.copy_(read).isfinite().all():
            return False
    return True


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(-1).view(torch.uint8).numpy()
