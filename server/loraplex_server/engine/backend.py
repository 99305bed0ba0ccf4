"""What the machine and its device allow, chosen once: kernels for 4-bit layers, for adapters and for what lies between.

Prepares the base for serving; knows no requests. Without any of it the engine goes through torch, bitsandbytes and peft
alone, the slow reference that every choice here is tested against.
"""

from dataclasses import dataclass

import torch

from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.errors import BaseUnusable
from loraplex_server.engine.fused import fuse
from loraplex_server.engine.lora import LoraKernel
from loraplex_server.engine.model import Base
from loraplex_server.engine.native_lora import NativeLora
from loraplex_server.engine.quantized import choose_kernels
from loraplex_server.engine.triton_lora import TritonLora
from loraplex_server.kernels.native import native


@dataclass(frozen=True)
class Backend:
    """What was chosen."""

    name: str  # for people
    lora: LoraKernel | None  # None: through peft's modules
    lora_dtype: torch.dtype  # what adapters are kept in on the device
    native: bool = False  # a CPU with our kernels
    cuda: bool = False  # a CUDA device with our kernels, which decode steps need to be replayed


def prepare(base: Base, config: EngineConfig) -> Backend:
    """Choose, and give the base's layers their kernels.

    Raises:
        BaseUnusable: see refuse_unserved.
    """
    refuse_unserved(base)
    choose_kernels(base.model, config.kernels, config.lean)
    if base.model.device.type == "cuda":
        if not config.kernels:
            return Backend("CUDA, no kernels of our own: turned off", None, base.dtype)
        return Backend("CUDA", TritonLora(base.dtype), base.dtype, cuda=True)
    if config.kernels and base.dtype == torch.bfloat16 and native():
        fuse(base.model)
        return Backend(native().name, NativeLora(), torch.bfloat16, native=True)
    why = "turned off" if not config.kernels else native().why_not or f"the base computes in {base.dtype}"
    return Backend(f"no kernels of our own: {why}", None, torch.float32)  # as peft keeps them


def refuse_unserved(base: Base) -> None:
    """Say early that the engine has no forward for a base.

    Raises:
        BaseUnusable: it is an encoder-decoder, or lies on several devices.
    """
    if base.model.config.is_encoder_decoder:
        raise BaseUnusable(f"base {base.id} is an encoder-decoder; only causal language models are served")
    if len(set(getattr(base.model, "hf_device_map", {}).values())) > 1:
        raise BaseUnusable(f"base {base.id} lies on several devices (device_map); a base is served on one")
