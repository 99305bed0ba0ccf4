"""Small modules of a model, computed by kernels where they give the same: what lies between two products on a CPU.

What a module computes is not told by its name: each is asked once, and replaced only if the kernel answers alike.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from loraplex_server.kernels.native import addresses, native

_CLOSE = 2**-7  # bfloat16 has eight bits of mantissa


@torch.no_grad()
def fuse(model: nn.Module) -> None:
    """Replace RMS norms, and the activation of gated feed-forwards, in a bfloat16 model on a CPU with our kernels."""
    if not native():
        return
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if is_rms_norm(module):
            replace(module, _rms_norm(module), module.weight.shape[0])
        elif is_gated(module):
            replace(module, _gated(module), module.gate_proj.in_features)


def replace(module: Any, fused: Callable[[torch.Tensor], torch.Tensor], width: int) -> None:
    """Let a module compute in another way, if that gives the same to within a rounding."""
    x = torch.randn(1, 2, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected, given = module(x).float(), fused(x).float()
    if torch.allclose(given, expected, rtol=_CLOSE, atol=_CLOSE * float(expected.abs().max())):
        module.forward = fused


def is_rms_norm(module: Any) -> bool:
    """Whether a module may be an RMS norm in bfloat16: ``replace`` makes sure."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(weight, torch.Tensor)
        and weight.dtype == torch.bfloat16
        and weight.ndim == 1
        and len(weight) % 16 == 0
        and epsilon_of(module) is not None
    )


def epsilon_of(module: Any) -> float | None:
    """What an RMS norm adds to the mean of squares, under whichever name it keeps it."""
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _rms_norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, epsilon, kernel = module.weight, epsilon_of(module), _library().rms_norm
    width = len(weight)

    def forward(x: torch.Tensor) -> torch.Tensor:  # (…, width)
        given = x.contiguous()
        out = torch.empty_like(given)
        kernel(*addresses(out, given, weight), given.numel() // width, width, epsilon)
        return out

    return forward


def is_gated(module: Any) -> bool:
    """Whether a module may be a gated feed-forward with SiLU: ``replace`` makes sure."""
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return all(hasattr(module, part) for part in parts) and getattr(module.gate_proj, "out_features", 1) % 16 == 0


def _gated(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    kernel = _library().silu_mul

    def forward(x: torch.Tensor) -> torch.Tensor:  # (…, hidden)
        gate, up = module.gate_proj(x).contiguous(), module.up_proj(x).contiguous()
        kernel(*addresses(gate, gate, up), gate.numel())
        return module.down_proj(gate)

    return forward


def _library() -> Any:
    return native().library
