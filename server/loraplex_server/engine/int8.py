"""An 8-bit base: weights as LLM.int8 stores them, multiplied dequantized; norms and logits in float32.

bitsandbytes' own product rounds activations to 8 bits too and takes out columns by what is in the whole batch, so that
a row's result depends on its neighbours; and on a CPU it does so in evaluation only: another model than was trained.
Here one product serves training and serving, on any device, and a row is computed alike in any company.
"""

from functools import partial
from typing import Any

import torch
from bitsandbytes.autograd._functions import MatMul8bitFp
from bitsandbytes.nn.modules import Linear8bitLt
from torch import nn
from transformers.modeling_utils import PreTrainedModel


class DequantizedLinear(Linear8bitLt):
    """LLM.int8's storage (arXiv:2208.07339) without its rounding of activations: a byte a weight, a scale an output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…, inputs) → (…, outputs)
        """What bitsandbytes computes on a CPU in training; the weight is dequantized again for the backward pass."""
        weight: Any = self.weight
        if weight.SCB is not None:  # the scales, until the first use
            self.init_8bit_state()
        self.state.CB = weight.data  # where peft dequantizes for itself, it leaves a new parameter without them
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return MatMul8bitFp.apply(x, weight, None, bias, self.state)  # pyright: ignore[reportReturnType]


def prepare_int8(model: PreTrainedModel, compute: torch.dtype) -> None:
    """Give a model that was loaded in 8 bits its products, float32 norms and float32 logits.

    Norms are a few vectors: their weights become float32, and what they give is ``compute`` again. The head keeps its
    weights, which would be gigabytes with a large vocabulary (peft's prepare_model_for_kbit_training raises them, and
    the embeddings, all the same); its logits become float32.
    """
    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.__class__ = DequantizedLinear
        elif type(module).__name__.endswith("Norm") and compute != torch.float32:
            compute_in_float32(module, gives=compute)
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_hook(partial(_give, dtype=torch.float32))


def compute_in_float32(module: nn.Module, gives: torch.dtype) -> None:
    """Raise a module's weights and what it is given to float32. By hooks: they go along with a copy of the module."""
    module.float()
    module.register_forward_pre_hook(_take_float32)
    module.register_forward_hook(partial(_give, dtype=gives))


def _take_float32(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(value.float() if value.is_floating_point() else value for value in inputs)


def _give(_: nn.Module, _inputs: tuple[torch.Tensor, ...], out: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return out.to(dtype)
